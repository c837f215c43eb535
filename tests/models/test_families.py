"""Ten families as different as can be, through adapter, packing, trimming, pruning, LoRA and export; two made wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_families
import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.experiment.checks import check_model
from distill.models.checkpoints import resolve
from distill.models.generation import _RereadingDecoder, context_of, decoder, has_cache
from distill.models.huggingface import HuggingFaceLanguageModel, load_pretrained
from distill.models.isolation import Fault, find_fault

pytestmark = pytest.mark.usefixtures("one_thread")

COLUMNS = ("adapter", "packed", "depth", "trimming", "lora", "hf")


@pytest.mark.parametrize("name", families.TEN)
def test_a_family_works_and_is_no_other_model(name: str, tmp_path: Path) -> None:
    family = families.Family(name, tmp_path)
    said = {column: getattr(family, column)() for column in COLUMNS}  # `families.Wrong` where another model answers
    assert said["packed"] == ("rows" if name in ("gpt_oss", "qwen3_next", "nemotron_h", "opt") else "positions")


@pytest.mark.parametrize("name", ["recurrent_gemma", "xlstm"])
def test_a_soft_cap_has_its_name_in_each_family(name: str, tmp_path: Path) -> None:
    families.Family(name, tmp_path).adapter()


@pytest.mark.parametrize("name", ["modernbert-decoder", "roberta"])
def test_a_family_may_transform_hidden_states_before_its_head(name: str, tmp_path: Path) -> None:
    """RoBERTa also counts positions from behind its padding token's number."""
    family = families.Family(name, tmp_path)
    for column in ("adapter", "streamed", "depth", "trimming", "lora", "hf"):
        getattr(family, column)()
    teacher = family.teacher()
    cached, rereading = decoder(teacher, tiny_families.TOKENS), _RereadingDecoder(teacher, tiny_families.TOKENS)
    assert has_cache(teacher)
    with torch.no_grad():
        for ids_BL in (family.ids_BL[:, :9], family.ids_BL[:, 9:10]):
            torch.testing.assert_close(cached(ids_BL), rereading(ids_BL), rtol=1e-4, atol=1e-4)


def test_a_family_that_counts_from_its_padding_token_keeps_that_tokens_number(tmp_path: Path) -> None:
    student = families.Family("roberta", tmp_path).student("huggingface")
    with pytest.raises(ValueError, match="counts positions from the number of its padding token"):
        student.keep_tokens(torch.arange(1, tiny_families.TOKENS))


def test_a_linear_layer_that_multiplies_otherwise_gets_no_adapter(tmp_path: Path) -> None:
    families.Family("deepseek_v4", tmp_path).lora()


def test_experts_whose_layout_is_found_by_their_shape_are_packed(tmp_path: Path) -> None:
    """transformers asks the model for the shape of a parameter that is packed by then."""
    families.Family("qwen3_vl_moe", tmp_path).nf4()


def test_a_decoder_in_a_base_of_its_own_is_streamed(tmp_path: Path) -> None:
    families.Family("bart", tmp_path).streamed()


@pytest.mark.parametrize("name", ["diffllama", "minicpm3"])
def test_layers_that_compute_by_their_number_are_not_cut_out_in_silence(name: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, UserError), match="is not its teacher without the others"):
        families.Family(name, tmp_path).depth()


def test_parts_of_layers_that_lie_elsewhere_are_not_mixed_up_in_silence(tmp_path: Path) -> None:
    """Inkling 2's checkpoints hold the layers' queries in a list of their own, which keeps its numbers."""
    with pytest.raises((ValueError, UserError), match="keeps parts of its layers outside of them"):
        families.Family("inkling2_text", tmp_path).depth()


def test_a_family_with_more_tables_of_tokens_is_not_trimmed_in_silence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be cut down to some of its tokens"):
        families.Family("cpmant", tmp_path).trimming()


class Warmer(nn.Linear):
    """A head with a transformation that no other family has."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).asinh()


def test_a_head_with_a_transformation_of_its_own_is_refused(tmp_path: Path) -> None:
    model = load_pretrained(resolve(str(tiny_families.write("qwen3_moe", tmp_path / "model"))), torch.float32)
    model.lm_head.__class__ = Warmer
    with pytest.raises(ValueError, match="makes its logits in a way this adapter does not know"):
        HuggingFaceLanguageModel(model).check()


def test_a_layer_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    model: Any = load_pretrained(resolve(str(tiny_families.write("lfm2", tmp_path / "model"))), torch.float32)
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.2"))
    own = layer.forward

    def looking(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(hidden + 0.1 * hidden.roll(-1, dims=1), *args, **kwargs)

    layer.forward = looking
    adapter = HuggingFaceLanguageModel(model)
    assert find_fault(adapter, tiny_families.TOKENS, "cpu") is Fault.FUTURE
    with pytest.raises(UserError, match="a position sees the tokens behind it"):
        check_model(adapter, "teacher", tiny_families.TOKENS, True)


def test_weights_that_a_family_rescales_to_read_stay_as_they_are(tmp_path: Path) -> None:
    """RWKV's own code packs its NF4 weights anew in another type, and misses those of streamed layers."""
    family = families.Family("rwkv", tmp_path)
    config = json.loads((family.folder / "config.json").read_text())
    (family.folder / "config.json").write_text(json.dumps({**config, "rescale_every": 2}))
    for column in ("adapter", "nf4", "streamed", "streamed_nf4", "hf"):
        getattr(family, column)()


def test_what_a_family_cannot_do_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^teacher huggingface: ReformerModel .* only with texts of some lengths"):
        families.Family("reformer", tmp_path).teacher()
    with pytest.raises(UserError, match=r"^--format hf: no class of text .* family qwen2_vl$"):
        families.Family("qwen2_vl", tmp_path).hf()


def test_lists_that_are_not_of_layers_do_not_stop_pruning(tmp_path: Path) -> None:
    """The layers of eyes and ears keep their number too."""
    families.Family("phi4_multimodal", tmp_path).depth()


def test_a_router_whose_weight_is_multiplied_by_itself_is_not_packed(tmp_path: Path) -> None:
    families.Family("longcat_flash", tmp_path).nf4()


def test_a_mixture_without_an_mlp_gives_experts(tmp_path: Path) -> None:
    families.Family("qwen3_5_moe_text", tmp_path).width()


def test_positions_of_padding_are_no_part_of_the_context(tmp_path: Path) -> None:
    assert context_of(tiny_families.tiny_config("roberta")) == 256 - 2
    assert context_of(tiny_families.tiny_config("bert")) == 256
