"""Plain finetuning with transformers' Trainer, as a user would write it.

    python -m bench.peers.finetune --student DIR --data SHARDS --output DIR --updates 300

Prints the Trainer's metrics as JSON at the end.
"""

from __future__ import annotations

from transformers import Trainer

from bench.peers.chats import Collator, read
from bench.peers.settings import arguments, frozen_tower, train, training_arguments
from pipeline.vlm.processing import load_processor  # AutoProcessor.from_pretrained, also without torchvision


def main() -> None:
    """Finetune."""
    options = arguments()
    processor = load_processor(options.student)
    trainer = Trainer(
        frozen_tower(options.student), training_arguments(options), Collator(processor), read(options.data)
    )
    train(trainer, processor, options.output)


if __name__ == "__main__":
    main()
