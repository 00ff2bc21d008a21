"""video2lora: a video becomes a LoRA adapter for the vision-language model that read it."""
