"""A rank without memory says what it did and what helps."""

import pytest
import torch

from pipeline.runtime.faults.out_of_memory import is_out_of_memory, what_helps


def on_cpu() -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (MemoryError(), True),
        (on_cpu(), True),
        (OSError(12, "Cannot allocate memory: cannot allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_too_little_memory_is_known(error, expected):
    assert is_out_of_memory(error) == expected


def test_the_message_names_the_work_its_size_and_the_fields():
    doing = "interact: update 3 of 9, micro-step 1 of 2: 8 x 512 tokens, 90 to predict, 8 with images"
    said = what_helps(torch.OutOfMemoryError("CUDA out of memory.\nmore"), doing)
    assert said.startswith(f"out of memory at {doing}: CUDA out of memory.. What needs less: a smaller interact.")
    assert "gradient_checkpointing: true" in said and "ds_configs/zero3_offload.json" in said
    said = what_helps(MemoryError(), "cache: after 3 samples of 9, a batch: 8 x 512 tokens")
    assert "MemoryError" in said and "a smaller cache.batch_tokens" in said and "gradient_checkpointing" not in said


def test_what_is_no_step_is_not_taken_for_one():
    """It named a field waiting until all hosts see runs/a/interact/student.micro_batch_tokens."""
    doing = "waiting until all hosts see runs/a/interact/student: done here, waiting for the other ranks"
    said = what_helps(MemoryError(), doing)
    assert f"at {doing}: MemoryError. What needs less: a smaller STEP.micro_batch_tokens (or .micro_batch_size)" in said
