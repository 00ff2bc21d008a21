"""A small local Hugging Face Hub, so that tests push and pull through huggingface_hub's real client."""
