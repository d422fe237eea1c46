"""The command line of `plan`. It imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.results.argument_types import above_zero, from_zero, positive, share

TEXT = """Say what a recipe will need on given GPUs: memory, disk, network, operations and hours, step by step.

  python -m pipeline plan --recipe recipes/NAME.yaml --gpus 64 --gpu-memory 80
  python -m pipeline plan --recipe recipes/NAME.yaml --gpus 64 --gpu-memory 80 --set reinforce.lora_rank=64
  python -m pipeline plan --recipe recipes/qwen2_vl_72b_to_7b.yaml --gpus 64 --gpu-memory 80 \\
    --set teacher.path=recipes/configs/qwen2_vl_72b student.path=recipes/configs/qwen2_vl_7b \\
    --samples 2900000 --tokens-per-sample 900 --image-tokens 650 --response-tokens 150

Nothing is loaded: of each model's folder only config.json is read. recipes/configs/ has those of the shipped pairs.

The number of samples comes from data.train's manifest, and their lengths from 256 of them, encoded as the student gets
them. Where the data or the student's tokenizer is not here, give the four numbers. Memory is that of a micro-batch of
the longest samples; hours are those of the mean sample. The longest of more than 256 is estimated from the sizes of all
in the manifest, and the estimate's largest error added; without sizes, and without data, it is data.max_length.

Memory is split into its causes: shards or whole weights as the DeepSpeed config has it, weights gathered for use,
gradients, optimizer states, activations (from a decoder layer that torch runs without numbers), chunks of logits. Where
a step does not fit, the command names the field that makes it fit, after trying it.

Hours are operations / (GPUs x --gpu-tflops x --utilisation x real share), or the time of the bytes on the slowest link
where that is longer. The real share is tokens of the samples over those that GPUs compute or wait for, from batches of
measured lengths, or of assumed ones, cut as in a run. --utilisation 0.4 is what well-kept training reaches; measure
yours: metrics.jsonl has tokens_per_s, which is for all GPUs; --tokens-per-second interact=N takes it for one.

docs/scale.md walks through the paper's largest pair.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="the run's YAML (recipes/)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override values of the recipe, as in --set interact.lora_rank=0",
    )  # fmt: skip
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="number of GPUs, over all nodes")
    parser.add_argument(
        "--gpu-memory", type=above_zero, required=True, metavar="GIB", help="memory of one GPU in GiB (2^30 bytes)"
    )
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="(default: 8)")
    parser.add_argument(
        "--gpu-tflops", type=above_zero, default=989.0, metavar="N",
        help="peak of one GPU in bf16 matrix products, in 10^12 operations a second (default: 989, an H100 or H200)",
    )  # fmt: skip
    parser.add_argument(
        "--utilisation", type=share, default=0.4, metavar="SHARE", help="share of that peak in use (default: 0.4)"
    )
    parser.add_argument(
        "--network", type=above_zero, default=50.0, metavar="N",
        help="10^9 bytes a second that a GPU receives from other nodes (default: 50, one 400 Gbit/s adapter a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens-per-second", type=_step_speed, action="append", default=[], metavar="STEP=N",
        help="measured speed of a step, in response tokens a second of one GPU; repeat for each step",
    )  # fmt: skip
    parser.add_argument("--samples", type=positive, metavar="N", help="number of training samples")
    parser.add_argument("--tokens-per-sample", type=above_zero, metavar="N", help="mean, all kinds of tokens")
    parser.add_argument("--image-tokens", type=from_zero, metavar="N", help="mean of a sample's image tokens")
    parser.add_argument("--response-tokens", type=above_zero, metavar="N", help="mean of a sample's response tokens")
    parser.add_argument(
        "--bytes-per-token-layer", type=above_zero, metavar="N", help="of the cache, as cache-info shows it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, operations")


def run(options: argparse.Namespace) -> None:
    """Make and print the plan."""
    from pipeline.results.plan import command
    from pipeline.results.plan.machine import Machine
    from pipeline.results.plan.samples import Given

    machine = Machine(
        options.gpus, options.gpu_memory, options.gpus_per_node, options.gpu_tflops, options.utilisation,
        options.network, dict(options.tokens_per_second),
    )  # fmt: skip
    given = Given(options.samples, options.tokens_per_sample, options.response_tokens, options.image_tokens)
    command.run(options.recipe, options.overrides, machine, given, options.bytes_per_token_layer, as_json=options.json)


def _step_speed(text: str) -> tuple[str, float]:
    step, equals, speed = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected STEP=N, such as interact=900, found {text!r}")
    return step, above_zero(speed)
