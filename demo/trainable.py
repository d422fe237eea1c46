"""A Qwen2-VL in training: the model's own modules, called so that batches of pictures of one size are fast.

B samples, N patches of a picture, I = N / 4 image tokens, S tokens of the longest sample, d width of the decoder.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from demo.batches import BatchSource, QuestionBatch
from demo.vocabulary import CHAT_TEMPLATE, MERGE, PATCH

PROBE_WEIGHT = 0.2
"""Weight of the probe's loss beside the loss on answers, in the second part of training."""


class TrainableModel(nn.Module):
    """Model, tokenizer and a linear probe on the image tokens, which is not kept."""

    def __init__(
        self, model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, batches: BatchSource
    ):
        super().__init__()
        self.model = model
        self.grid, self.values = batches.grid, batches.values
        self.probe = nn.Linear(model.config.text_config.hidden_size, sum(self.values))
        self._tokenizer = tokenizer
        self._pieces: dict[str, list[int]] = {}

    def probe_loss(self, features: Tensor, attributes: Tensor) -> Tensor:
        """Cross-entropy of the attributes of each region, predicted from its image tokens by one linear layer.

        features [B, I, d], attributes [B, R, A] (-1: unknown) -> scalar, summed over attributes.
        """
        rows, columns = self.grid
        regions = attributes.shape[1]
        pooled = features.view(len(features), rows, regions, columns // regions, -1).mean((1, 3))
        guesses = self.probe(pooled).split(self.values, -1)
        losses = [
            F.cross_entropy(g.flatten(0, 1), s.flatten(), ignore_index=-1)
            for g, s in zip(guesses, attributes.unbind(-1), strict=True)
        ]
        return torch.stack(losses).sum()

    def loss(self, batch: QuestionBatch) -> Tensor:
        """Cross-entropy of the answers' tokens, end of turn included, plus PROBE_WEIGHT times the probe's loss."""
        features = self.encode_images(batch.pictures)
        logits, targets = self.answer_logits(features, batch)
        return F.cross_entropy(logits, targets) + PROBE_WEIGHT * self.probe_loss(features, batch.attributes)

    @torch.no_grad()
    def exact_match(self, batch: QuestionBatch) -> float:
        """Share of samples whose every answer token is the likeliest one given the right ones before it.

        That is exactly when greedy generation gives the right answer.
        """
        logits, targets = self.answer_logits(self.encode_images(batch.pictures), batch)
        right = (logits.argmax(-1) == targets).tolist()
        lengths = [len(self._encode(f"{answer}<|im_end|>")) for answer in batch.answers]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return sum(all(right[s : s + n]) for s, n in zip(starts, lengths, strict=True)) / len(lengths)

    def encode_images(self, pictures: Tensor) -> Tensor:
        """Run the tower on pictures of one size, [B, 3, height, width] -> image tokens [B, I, d].

        What model.get_image_features gives, without its loop over pictures.
        """
        tower = self.model.model.visual
        x = F.linear(patchify(pictures), tower.patch_embed.proj.weight.flatten(1))
        rotation = tower.rotary_pos_emb(x, self._patch_places.to(x.device))
        for block in tower.blocks:
            x = x + _attend(block.attn, block.norm1(x), rotation)
            x = x + block.mlp(block.norm2(x))
        return tower.merger(x).view(len(pictures), -1, self.model.config.text_config.hidden_size)

    def answer_logits(self, features: Tensor, batch: QuestionBatch) -> tuple[Tensor, Tensor]:
        """Predict every answer token from what stands before it: logits [T, vocabulary] and targets [T]."""
        ids, is_answer = self._tokens(batch)
        ids, is_answer = ids.to(features.device), is_answer.to(features.device)
        embeds = self.model.get_input_embeddings()(ids)
        image = slice(len(self._opening), len(self._opening) + features.shape[1])
        embeds = torch.cat([embeds[:, : image.start], features, embeds[:, image.stop :]], dim=1)
        positions = self._positions(ids).expand(3, len(ids), -1)
        # No mask: samples are padded on the right, where no causal attention looks.
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False
        ).last_hidden_state
        return self.model.lm_head(hidden[:, :-1][is_answer[:, 1:]]), ids[is_answer]

    def _tokens(self, batch: QuestionBatch) -> tuple[Tensor, Tensor]:
        rows, starts = [], []
        for question, answer in zip(batch.questions, batch.answers, strict=True):
            prompt = self._encode(self._prompt(question))
            rows.append(prompt + self._encode(f"{answer}<|im_end|>"))
            starts.append(len(prompt))
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._tokenizer.pad_token_id)
        is_answer = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            is_answer[i, start : len(row)] = True
        return ids, is_answer

    def _prompt(self, question: str) -> str:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self._tokenizer.apply_chat_template(
            chat, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        return text.replace("<|image_pad|>", "<|image_pad|>" * (self.grid[0] * self.grid[1]))

    def _encode(self, text: str) -> list[int]:
        if text not in self._pieces:
            self._pieces[text] = self._tokenizer(text)["input_ids"]
        return self._pieces[text]

    @cached_property
    def _opening(self) -> list[int]:
        return self._encode("<|im_start|>user\n<|vision_start|>")

    @cached_property
    def _patch_places(self) -> Tensor:
        """[N, 2] row and column of each patch, in the order of patchify."""
        rows, columns = (MERGE * n for n in self.grid)
        places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        return places.view(2, rows // MERGE, MERGE, columns // MERGE, MERGE).transpose(2, 3).flatten(1).T

    def _positions(self, ids: Tensor) -> Tensor:
        """[3, 1, S] rotary positions, equal for all samples: the same words open each, and then its picture."""
        kinds = (ids[:1] == self.model.config.image_token_id).long()
        grid = torch.tensor([[1, MERGE * self.grid[0], MERGE * self.grid[1]]], device=ids.device)
        return self.model.model.get_rope_index(ids[:1], mm_token_type_ids=kinds, image_grid_thw=grid)[0]


def patchify(pictures: Tensor) -> Tensor:
    """Cut pictures as the image processor does: [B, 3, height, width] -> [B, N, 3 * 2 * PATCH * PATCH]."""
    batch, channels, height, width = pictures.shape
    side = PATCH * MERGE
    cut = pictures.view(batch, channels, height // side, MERGE, PATCH, width // side, MERGE, PATCH)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # a still picture: the same twice along time
    return cut.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(batch, -1, channels * 2 * PATCH * PATCH)


def _attend(attention: nn.Module, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Run a tower's attention on [B, N, width], all pictures at once."""
    batch, patches, width = x.shape
    q, k, v = attention.qkv(x).view(batch, patches, 3, attention.num_heads, -1).unbind(2)
    q, k = apply_rotary_pos_emb_vision(q, k, *rotation)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attention.proj(out.transpose(1, 2).reshape(batch, patches, width))
