"""Body and head of any Hugging Face causal language model, with a check that they make the model's own logits.

Shapes: B batch, L sequence length, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError, first_line
from distill.models.checkpoints import Checkpoint, adapter_files, load_config, stored_names, text_renaming, weight_files
from distill.models.contract import not_finite
from distill.models.embedding_trimming import keep_tokens
from distill.models.gguf_header import reading_gguf
from distill.models.language_model import Head
from distill.models.packed_attention import by_documents, register
from distill.models.shapes import finder
from distill.models.stored_types import check_stored_types
from distill.models.text_part import base_name, construct, model_class
from distill.models.traits import first_position, keep_scale, refuse_lengths, transformation
from distill.system.memory import is_out_of_memory
from distill.system.quiet import quiet_transformers


class HuggingFaceLanguageModel(torch.nn.Module):
    """A `transformers` causal language model as body and head.

    Documents packed in one row stay apart if no attention mask is given and `position_ids` restart: transformers then
    builds the block-diagonal mask itself, and a CPU attends to each document alone (`packed_attention`).
    `distill.models.isolation` measures whether a family really keeps them apart.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        prefix = base_name(type(model))
        if not prefix or not hasattr(model, prefix) or model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} is not a causal language model with a base model and a head")
        refuse_lengths(getattr(model, prefix))
        register()
        keep_scale(getattr(model, prefix))
        self.model = model
        self._base_name = prefix
        forward = inspect.signature(getattr(model, prefix).forward).parameters
        self._takes_positions = "position_ids" in forward  # state-space families know no positions
        parts = (getattr(model, prefix), model.get_output_embeddings())
        known = {id(parameter) for part in parts for parameter in part.parameters()}
        self._prepares = any(id(parameter) not in known for parameter in model.parameters())
        self.first_position = first_position(getattr(model, prefix))

    def body(self, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Return the hidden states `[B, L, D]` that the head multiplies: after the last norm."""
        positions = {"position_ids": position_ids_BL + self.first_position} if self._takes_positions else {}
        with by_documents(position_ids_BL):
            return self.read(input_ids=input_ids_BL, use_cache=False, **positions)[0]

    def read(self, **given: Any) -> tuple[Tensor, Any]:
        """Give tokens to the family's own forward; return the hidden states that the head multiplies, and its answer.

        Families of BERT's kind transform the hidden states once more before the head's product, with weights that
        belong to neither. Their whole forward runs, and the product passes its input through.
        """
        if not self._prepares:
            answer = getattr(self.model, self._base_name)(**given)
            return answer.last_hidden_state, answer
        output = self.model.get_output_embeddings()
        output.forward = lambda hidden: hidden
        try:
            answer = self.model(**given)
        finally:
            del output.forward
        return answer.logits, answer

    @property
    def head(self) -> Head:
        """The output embedding, with the family's transformation from its configuration."""
        output = self.model.get_output_embeddings()
        if not output.weight.is_floating_point():
            raise ValueError(
                "the head of this checkpoint is quantized itself; use a checkpoint that keeps it unquantized"
            )
        return Head(output.weight, getattr(output, "bias", None), **transformation(self.model.config))

    def not_cast(self) -> Iterable[Tensor]:
        """Return the tensors that keep their type in every cast: buffers that are computed and never stored.

        Rotary frequencies in 16 bits would move far positions away from their places in the saved model.
        """
        return [
            buffer
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply a cast or move. torch calls this for all of them, from any module around this one."""
        keep = {id(tensor) for tensor in self.not_cast()}

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in keep and new.dtype != tensor.dtype else new

        return super()._apply(moved, recurse)

    @torch.no_grad()
    def check(self) -> None:
        """Raise ValueError if `head(body(x))` differs from the model's own logits: the family is made another way.

        The tolerance is the rounding of the model's own dtype, relative to the norm of its logits. Without weights
        there is nothing to compare.
        """
        if finder() is not None:
            return
        weight = self.model.get_output_embeddings().weight
        ids_BL = torch.arange(8, device=weight.device)[None] * 7 % weight.shape[0]
        positions_BL = torch.arange(8, device=weight.device)[None]
        training = self.training
        self.eval()
        family = type(self.model).__name__
        try:
            # Without positions, for a family may begin to count them elsewhere than at 0.
            own_BLV = self.model(input_ids=ids_BL, use_cache=False).logits.float()
            ours_BLV = self.head(self.body(ids_BL, positions_BL)).float()
        except (RuntimeError, TypeError) as failure:
            if is_out_of_memory(failure):
                raise
            raise ValueError(
                f"{family} fails on its first tokens ({first_line(failure)}): set quantization to 'none' if it is not, "
                "or another compute_dtype"
            ) from failure
        finally:
            self.train(training)
        if own_BLV.shape != ours_BLV.shape:
            raise ValueError(
                f"{family} makes logits of another shape than its head's {tuple(ours_BLV.shape)}: not supported"
            )
        if not own_BLV.isfinite().all():
            raise ValueError(not_finite(weight.dtype))
        error = torch.linalg.vector_norm(own_BLV - ours_BLV) / torch.linalg.vector_norm(own_BLV)
        if not error <= max(torch.finfo(weight.dtype).eps, 1e-5):
            raise ValueError(
                f"{family} makes its logits in a way this adapter does not know (relative error {error:.1e}): "
                "not supported; write a plug-in with its own `body` and `head`"
            )

    def keep_tokens(self, kept_ids: Tensor) -> None:
        """Cut embedding and head down to the tokens `kept_ids` (rising), which become tokens 0, 1, 2 and so on.

        The logits of these tokens stay the same; a family in which they would not is refused with ValueError. Token
        numbers in the configuration (the end of a text, the padding) become the new ids; those of lost tokens become
        None.
        """
        padding = self.first_position - 1
        if self.first_position and kept_ids[padding : padding + 1].tolist() != [padding]:
            raise ValueError(
                f"{type(self.model).__name__} counts positions from the number of its padding token, which would be "
                "another one without the tokens before it; leave --student.vocabulary full"
            )
        keep_tokens(self.model, self._logits, kept_ids, compares=finder() is None)

    @torch.no_grad()
    def _logits(self, ids_L: Tensor) -> Tensor:
        """Return the logits `[L, V]` of a row of tokens in evaluation mode."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return self.head(self.body(ids_L[None], torch.arange(len(ids_L), device=ids_L.device)[None]))[0].float()
        finally:
            for module, mode in modes:
                module.training = mode

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face folder (safetensors)."""
        # The tensors get the family's published names, which other programs look for, whatever names they were read by:
        # transformers would repeat those.
        vars(self.model).pop("_weight_conversions", None)
        with quiet_transformers():
            self.model.save_pretrained(folder)


def load_pretrained(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    quantization_config: Any = None,
    device_map: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load the `transformers` model of a checkpoint, from safetensors or GGUF (dequantised), never from pickle."""
    import transformers

    if finder() is None:
        weight_files(checkpoint)  # refuses pickle, and a folder without weights
        adapter_files(checkpoint)  # refuses one that would be left out
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    if checkpoint.gguf_file is not None:
        assert quantization_config is None, "a GGUF file is dequantised first"
        options["gguf_file"] = checkpoint.gguf_file
        options["config"] = load_config(checkpoint, trust_remote_code)
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
        options["config"] = load_config(checkpoint, trust_remote_code)
        if finder() is None:
            if getattr(options["config"], "quantization_config", None) is None:
                check_stored_types(checkpoint)
            prefixes = text_renaming(checkpoint, stored_names(checkpoint), trust_remote_code)
            if prefixes:
                options["key_mapping"] = {f"^{re.escape(before)}": after for before, after in prefixes.items()}
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
    with quiet_transformers():
        try:
            if finder() is not None:
                return shape_of(load_config(checkpoint, trust_remote_code), dtype, trust_remote_code)
            family = model_class(options["config"])
            with reading_gguf(checkpoint.gguf_file):
                loaded: Any = family.from_pretrained(
                    checkpoint.folder,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # so that the report tells of them, and not transformers' log
                    trust_remote_code=trust_remote_code,
                    **options,
                )
        except UserError:
            raise
        except Exception as error:  # odd values of a config fail anywhere in a family's code
            is_plain = checkpoint.gguf_file is None and not adapter_files(checkpoint) and quantization_config is None
            if "above report" in str(error) and is_plain:  # in a log that nobody sees
                _read_all(checkpoint, dtype, trust_remote_code)
            raise UserError(
                f"{checkpoint.name}: cannot be loaded as a causal language model: {first_line(error)}"
            ) from error
    model, report = loaded
    complain_about_missing(report, checkpoint.name)
    return model


def _read_all(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """Read a plain checkpoint's weights one by one. Raises UserError for the first that does not fit."""
    from distill.models.streaming import Weights, without_weights  # which need this file
    from distill.models.tensors import tensors

    config = load_config(checkpoint, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        return
    model = without_weights(config, dtype, trust_remote_code)
    weights = Weights(model, tensors(checkpoint), checkpoint.name)
    for _ in weights.read(set(model.state_dict()) - weights.missing):
        pass


def shape_of(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Make the `transformers` model of a configuration with weights of any value."""
    with quiet_transformers():
        return construct(config, dtype, trust_remote_code)


def parameters_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> int:
    """Return the number of parameters of a checkpoint's model, from its configuration alone."""
    with torch.device("meta"):
        model = shape_of(load_config(checkpoint, trust_remote_code), torch.float32, trust_remote_code)
    return sum(weight.numel() for weight in model.parameters())


def from_weights(model_class: Any, config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> Any:
    """Make a `transformers` model of weights in memory. Raises UserError, with the `name`, if some are missing."""
    with quiet_transformers():
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # see load_pretrained
            trust_remote_code=False,  # the class is here already, with whatever code it needs
        )
    complain_about_missing(report, name)
    return model


def complain_about_missing(report: Any, name: str) -> None:
    """Raise UserError if a loading report names weights that the checkpoint lacks, because they would stay random.

    So do weights of another shape than the configuration's: name, shape in the checkpoint, and shape that is wanted.
    """
    info = report if isinstance(report, dict) else vars(report)
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    what = [f"lacks {weight}" for weight in missing]
    what += [
        f"has {weight} as {list(found)}, where its configuration wants {list(wanted)}"
        for weight, found, wanted in mismatched
    ]
    if what:
        more = f" (and {len(what) - 1:,} more weights that do not fit)" if len(what) > 1 else ""
        raise UserError(f"{name}: the checkpoint {what[0]}{more}")
