"""The verbalizer: verb-FFN, the model's own final norm, the model's own language head (paper, sections 3 and 4.1).

T response tokens, d width, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.signal import Unembedding
from pipeline.vlm.families import final_norm, lm_head, unembedding


class VerbFFN(nn.Module):
    """h + W_down(SiLU(W_gate n(h)) * (W_up n(h))) with n an RMSNorm and W_down = 0 at first: the logit lens.

    With form="paper", the literal W_down(SiLU(W_gate h) * (W_up h)) of section 4.1, nothing at zero.
    """

    def __init__(
        self, width: int, form: str = "residual", dtype: torch.dtype = torch.float32, device: str | None = None
    ):
        """device: "meta" makes no values; call `to_empty`, then `draw`."""
        super().__init__()
        self.form = form
        self.gate = nn.Linear(width, width, bias=False, dtype=dtype, device=device)
        self.up = nn.Linear(width, width, bias=False, dtype=dtype, device=device)
        self.down = nn.Linear(width, width, bias=False, dtype=dtype, device=device)
        if form == "residual":
            self.norm = nn.RMSNorm(width, eps=1e-6, dtype=dtype, device=device)

    def draw(self) -> None:
        """Draw initial values from torch's generator: with the residual, those of the logit lens."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]
        if self.form == "residual":
            nn.init.zeros_(self.down.weight)  # drawn nonetheless: what the next layer draws depends on it

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, d] -> [T, d]."""
        normed = self.norm(hidden) if self.form == "residual" else hidden
        change = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return hidden + change if self.form == "residual" else change


class LanguageHead(nn.Module):
    """The model's own head as one module, so that ZeRO-3 gathers it once a step, for all layers.

    It shares the head's parameters; it does not copy them.
    """

    def __init__(self, model: nn.Module, vocab: int):
        super().__init__()
        head = lm_head(model)
        self.weight = head.weight
        self.bias = head.bias
        self._describe = lambda weight, bias: unembedding(model, weight, bias, vocab)

    def forward(self, use: Callable[..., Any], hidden: Any, *more: Any, **options: Any) -> Any:
        """Call `use(hidden, unembedding, *more, **options)` while the head is gathered."""
        return use(hidden, self._describe(self.weight, self.bias), *more, **options)


class StoredHead(nn.Module):
    """A frozen head that came with a teacher cache, used as LanguageHead is."""

    def __init__(self, head: Unembedding):
        super().__init__()
        self.weight = nn.Parameter(head.weight, requires_grad=False)
        self.bias = None if head.bias is None else nn.Parameter(head.bias, requires_grad=False)
        # Without its tensors: ZeRO-3 cuts the parameters to this rank's part, and the whole must not stay beside it.
        self._like = replace(head, weight=head.weight.new_empty(0), bias=None)

    def forward(self, use: Callable[..., Any], hidden: Any, *more: Any, **options: Any) -> Any:
        """Call `use(hidden, unembedding, *more, **options)` while the head is gathered."""
        return use(hidden, replace(self._like, weight=self.weight, bias=self.bias), *more, **options)


class VerbalizedVLM(nn.Module):
    """A backbone with verbalizers on its target layers and one head for them and for the last layer."""

    def __init__(self, backbone: nn.Module, layers: Sequence[int], verb_ffns: nn.ModuleDict, vocab: int):
        super().__init__()
        self.backbone = backbone
        self.layers = tuple(layers)
        self.depth = int(backbone.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr,operator]
        self.verb_ffns = verb_ffns
        self.head = LanguageHead(backbone, vocab)

    def verbalize_states(self, hidden: Sequence[Tensor]) -> Tensor:
        """Hidden states of the target layers and of the last, each [T, d], to normed head inputs [L + 1, T, d]."""
        *targets, last = hidden
        verbalized = [self.verb_ffns[str(layer)](state) for layer, state in zip(self.layers, targets, strict=True)]
        norm = final_norm(self.backbone)
        return torch.stack(
            [norm(state) for state in (*verbalized, last)]
        )  # a layer at a time: norms compute in float32

    def all_layers(self) -> tuple[int, ...]:
        """The target layers and the last one."""
        return (*self.layers, self.depth)
