"""A GGUF file's tensors under the names of its model, each dequantised when it is read.

The tables of names and layouts are transformers' own. The file is mapped, so its pages are the system's to give back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.errors import UserError
from distill.models.checkpoints import Checkpoint, load_config, weight_files
from distill.models.gguf_header import plain_reader, reading_gguf
from distill.models.huggingface import quiet_transformers
from distill.models.streaming import without_weights


class GGUFTensors:
    """The tensors of a GGUF file by their names in its model, in float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Look up what each tensor is made of. Raises UserError for an architecture that is not read this way."""
        from transformers import modeling_gguf_pytorch_utils as legacy
        from transformers.integrations.gguf.utils import is_gguf_arch_supported

        weight_files(checkpoint)  # refuses a damaged file
        reader = plain_reader()(checkpoint.path)
        architecture = legacy.read_field(reader, "general.architecture")[0]
        if is_gguf_arch_supported(architecture):  # by tables of another form
            raise UserError(
                f"{checkpoint.name}: a GGUF file of architecture {architecture} is dequantised as a whole only: name "
                "the folder of safetensors that it was made of"
            )
        with quiet_transformers(), reading_gguf(str(checkpoint.path)):
            self._parsed = legacy.load_gguf_checkpoint(str(checkpoint.path))
            model = without_weights(load_config(checkpoint), torch.float32, False)
            self._processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)(
                config=self._parsed["config"]
            )
            self._names = legacy.get_gguf_hf_weights_map(model, self._processor)
        self._parts: dict[str, list[Any]] = {}
        for tensor in reader.tensors:
            name = self._names.get(tensor.name) or self._names.get(tensor.name.removesuffix(".weight"))
            if name is not None:
                self._parts.setdefault(name, []).append(tensor)

    def names(self) -> list[str]:
        return sorted(self._parts)

    def read(self, name: str) -> Tensor:
        """Return one tensor. An expert's two matrices in one tensor are two in the file."""
        import gguf

        made: dict[str, Tensor] = {}
        for tensor in self._parts[name]:
            result = self._processor.process(
                weights=gguf.dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters={**self._parsed, "tensors": made},
            )
            if result.name is not None:  # else it is in `made` already
                made[name] = torch.tensor(result.weights)
        return made[name]
