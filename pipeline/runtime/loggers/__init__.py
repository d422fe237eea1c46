"""Where the lines of metrics.jsonl are shown besides: TensorBoard, wandb, trackio."""
