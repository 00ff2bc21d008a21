"""Example: train a hypernetwork, released or your own, further on your clips.

    python examples/fine_tune.py user/model clips.jsonl -o my-model --epochs 3

`clips.jsonl` has a line for each clip, such as

    {"video": "kitchen.mp4", "conversations": [{"prompt": "What is cooked?", "response": "An omelette."}]}
"""

from __future__ import annotations

import argparse

import torch

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.data import check_rows, group_queries, load_rows
from video2lora.trainer import Video2LoraTrainer, Video2LoraTrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Hub id or directory of the hypernetwork to start from")
    parser.add_argument("rows", help="JSONL file of your clips")
    parser.add_argument("-o", "--output", required=True, help="directory of the trained model")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps instead")
    parser.add_argument("--batch-size", type=int, default=4, help="videos on a device at once")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="a fifth of the recipe's")
    parser.add_argument("--eval-rows", type=int, default=1, help="clips held out to evaluate on")
    parser.add_argument("--workers", type=int, default=4, help="processes that decode videos")
    options = parser.parse_args()

    check_rows(options.rows).raise_for_errors()
    rows = group_queries(load_rows(options.rows))  # a video with many questions is encoded once
    parts = rows.train_test_split(test_size=options.eval_rows, seed=42)

    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    model = Video2LoraModel.from_pretrained(options.checkpoint, dtype=torch.bfloat16 if bf16 else torch.float32)
    processor = Video2LoraProcessor.from_pretrained(options.checkpoint)
    args = Video2LoraTrainingArguments(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        bf16=bf16,
        dataloader_num_workers=options.workers,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer = Video2LoraTrainer(
        model, args, train_dataset=parts["train"], eval_dataset=parts["test"], processing_class=processor
    )
    trainer.train()
    trainer.save_model()
    print(f"{options.output} is trained: video2lora internalize clip.mp4 --model {options.output} -o clip-lora")


if __name__ == "__main__":
    main()
