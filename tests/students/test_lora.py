"""LoRA students: only adapters learn, the rest stays, and what is saved is an ordinary model that equals them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.models.isolation import isolates_documents
from distill.models.quantization import full_weight, quantize_linears
from distill.training.activation_checkpointing import checkpoint_blocks
from students.lora import LoraLanguageModel, add_adapters, load_lora_student

V = 99
IDS_BL = torch.arange(24).reshape(2, 12) * 5 % V
POSITIONS_BL = torch.arange(12).expand(2, -1)


@pytest.fixture(scope="module")
def folder(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(path)
    return str(path)


def fresh(folder: str, seed: int = 1, **options: Any) -> LoraLanguageModel:
    torch.manual_seed(seed)
    return load_lora_student(folder, **{"rank": 4, "base_dtype": "float32", **options})


def logits(model: Any, ids_BL: torch.Tensor = IDS_BL) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().head(model.body(ids_BL, POSITIONS_BL))


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss(model: Any, ids_BL: torch.Tensor = IDS_BL) -> torch.Tensor:
    return torch.logsumexp(model.head(model.body(ids_BL, POSITIONS_BL)), -1).sum()


def train(model: Any, steps: int = 3, ids_BL: torch.Tensor = IDS_BL) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model.train(), ids_BL).backward()
        optimizer.step()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_only_the_adapters_learn_and_they_are_float32(folder: str, quantization: str, base_dtype: str) -> None:
    student = fresh(folder, quantization=quantization, base_dtype=base_dtype)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    dtype = getattr(torch, base_dtype)
    assert len(trainable(student)) == 2 * 7 * 2
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad is (".lora_" in name)
        frozen = torch.uint8 if quantization == "nf4" and "_proj" in name else dtype
        assert parameter.dtype is (torch.float32 if parameter.requires_grad else frozen), name
    assert student.head.weight_VD.dtype is dtype and not student.head.weight_VD.requires_grad
    train(student)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]) is (".lora_" not in name), name


def test_fresh_adapters_change_nothing(folder: str) -> None:
    assert torch.equal(logits(fresh(folder)), logits(fresh(folder, rank=2, seed=5)))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(logits(fresh(folder)), plain(input_ids=IDS_BL).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_a_state_space_model_has_adapters_too(base_dtype: str, tiny_model: Any, tmp_path: Path) -> None:
    tiny_model("mamba2").save_pretrained(tmp_path)
    student = fresh(str(tmp_path), target_modules=["in_proj"], base_dtype=base_dtype)
    train(student)
    error = (logits(student.merged()) - logits(student)).norm() / logits(student).norm()
    assert error < (1e-5 if base_dtype == "float32" else 3e-2)
    # Mamba's kernel takes out_proj's weight as it is, past any adapter.
    assert {name.split(".")[-4] for name in trainable(fresh(str(tmp_path)))} == {"in_proj"}
    with pytest.raises(ValueError, match=r"target_modules: no linear layer 'out_proj'"):
        fresh(str(tmp_path), target_modules=["out_proj"])


def test_a_mixture_says_that_its_experts_stay(tiny_model: Any, tmp_path: Path, folder: str) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    (note,) = fresh(str(tmp_path)).notes
    assert "experts get no adapters" in note and not fresh(folder).notes


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_the_saved_folder_is_an_ordinary_model_that_equals_the_adapted_one(
    family: str, quantization: str, tiny_model: Any, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    student = fresh(str(tmp_path / "base"), quantization=quantization)
    untrained = logits(student)
    train(student)
    student.save_pretrained(tmp_path / "student")
    assert sorted(file.name for file in (tmp_path / "student").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert "quantization_config" not in (tmp_path / "student/config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert type(again).__name__ == type(tiny_model(family)).__name__
    with torch.no_grad():
        found = again(input_ids=IDS_BL).logits
    assert (logits(student) - untrained).norm() > 0.1 * untrained.norm()
    torch.testing.assert_close(found, logits(student), rtol=0, atol=1e-5)


def test_merging_leaves_the_training_as_it_is(folder: str) -> None:
    one, other = (fresh(folder, quantization="nf4", dropout=0.2) for _ in range(2))
    checkpoint_blocks(one), checkpoint_blocks(other)
    for model in (one, other):
        torch.manual_seed(3)
        train(model, steps=1)
        if model is one:
            merged = one.merged()
            assert not any(
                tensor.untyped_storage().data_ptr() == found.untyped_storage().data_ptr()
                for tensor in one.state_dict().values()
                for found in merged.state_dict().values()
            )
        train(model, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bfloat16_bases_are_merged_in_float32(folder: str, quantization: str) -> None:
    student = fresh(folder, quantization=quantization, base_dtype="bfloat16", lora_alpha=6)
    train(student)
    name = "model.layers.1.mlp.down_proj"
    layer = student.model.get_submodule(name)
    delta = 6 / 4 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    base = full_weight(layer.get_base_layer())
    merged = student.merged().model
    assert base.dtype is torch.bfloat16 and {p.dtype for p in merged.parameters()} == {torch.float32}
    assert torch.equal(merged.get_submodule(name).weight, base.float() + delta)
    half = fresh(folder, export_dtype="bfloat16").merged().model
    assert {p.dtype for p in half.parameters()} == {half.config.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_casting_the_model_leaves_the_adapters_as_they_are(folder: str, quantization: str) -> None:
    """As train.precision bf16-true does, through whatever module is around it."""
    student = fresh(folder, quantization=quantization)
    drawn = {name: parameter.clone() for name, parameter in trainable(student).items()}
    torch.nn.ModuleList([student]).to(torch.bfloat16)
    assert drawn and all(torch.equal(parameter, drawn[name]) for name, parameter in trainable(student).items())
    assert student.head.weight_VD.dtype is student.model.model.norm.weight.dtype is torch.bfloat16
    untrained = logits(student)
    train(student)
    assert not any(torch.equal(parameter, drawn[name]) for name, parameter in trainable(student).items())
    assert {parameter.grad.dtype for parameter in trainable(student).values() if parameter.grad is not None} == {
        torch.float32
    }
    assert (logits(student) - untrained).norm() > 0.1 * untrained.norm()
    error = (logits(student.merged()) - logits(student)).norm() / logits(student).norm()
    assert error < 3e-2


def test_layers_quantised_one_by_one_as_a_gguf_files_are(tiny_model: Any) -> None:
    model = tiny_model("gpt2")
    quantize_linears(model, "nf4", torch.float32, "cpu")
    add_adapters(model, ["c_attn", "c_fc"], 4, 8.0, 0.0)
    student = LoraLanguageModel(model)
    train(student)
    torch.testing.assert_close(logits(student.merged()), logits(student), rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradients_reach_every_adapter_and_recomputation_changes_none(folder: str, quantization: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        student = fresh(folder, quantization=quantization)
        with torch.no_grad():
            for parameter in trainable(student).values():
                parameter.add_(0.05)
        if checkpointed:
            assert checkpoint_blocks(student) == 2
        loss(student.train()).backward()
        gradients.append([parameter.grad for parameter in trainable(student).values()])
        assert all(parameter.grad is None for parameter in student.parameters() if not parameter.requires_grad)
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and recomputed is not None and plain.norm() > 0
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # with a head of its own, and with a tied one
def test_a_trimmed_vocabulary_stays_frozen_and_is_merged(
    family: str, quantization: str, tiny_model: Any, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    full, trimmed = (fresh(str(tmp_path), quantization=quantization) for _ in range(2))
    kept_ids = torch.arange(0, V, 2)
    trimmed.keep_tokens(kept_ids)
    assert trainable(trimmed).keys() == trainable(full).keys()
    assert trimmed.head.weight_VD.shape[0] == len(kept_ids)
    train(trimmed, ids_BL=IDS_BL // 2)
    assert all(torch.equal(a, b) for a, b in zip(trimmed.head.weight_VD, full.head.weight_VD[kept_ids], strict=True))
    again = trimmed.merged()
    assert again.model.config.vocab_size == len(kept_ids)
    torch.testing.assert_close(logits(again, IDS_BL // 2), logits(trimmed, IDS_BL // 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_packed_documents_stay_apart(folder: str, quantization: str) -> None:
    student = fresh(folder, quantization=quantization, dropout=0.5)
    train(student)
    assert isolates_documents(student, V, "cpu")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_learns_is_enough_of_a_checkpoint(folder: str, quantization: str) -> None:
    """The rest is made again from the base model and the seed, to the last bit."""
    trained = fresh(folder, quantization=quantization, base_dtype="bfloat16")
    train(trained)
    kept = {name: tensor for name, tensor in trained.state_dict().items() if name in trainable(trained)}
    again = fresh(folder, quantization=quantization, base_dtype="bfloat16")
    assert not torch.equal(logits(again), logits(trained))
    assert again.load_state_dict(kept, strict=False).unexpected_keys == []
    assert again.state_dict().keys() == trained.state_dict().keys()
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(logits(again), logits(trained))


def test_the_seed_makes_the_adapters(folder: str) -> None:
    one, same, other = fresh(folder), fresh(folder), fresh(folder, seed=2)
    name = "model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(trainable(one)[name], trainable(same)[name])
    assert not torch.equal(trainable(one)[name], trainable(other)[name])


def test_dropout_is_for_training_alone(folder: str) -> None:
    student = fresh(folder, dropout=0.5)
    train(student)
    assert torch.equal(logits(student), logits(student))
    assert not torch.equal(loss(student.train()), loss(student))


def test_chosen_layers_alone_are_adapted(folder: str) -> None:
    student = fresh(folder, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    assert {name.partition(".lora_")[0] for name in trainable(student)} == {
        "model.model.layers.0.self_attn.q_proj",
        "model.model.layers.1.self_attn.q_proj",
        "model.model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "k_prj"]}, "no linear layer 'k_prj'; did you mean 'k_proj'.*known: .*v_proj"),
        ({"target_modules": ["lm_head"]}, "no linear layer 'lm_head'"),
        ({"target_modules": ["embed_tokens"]}, "no linear layer 'embed_tokens'"),
        ({"target_modules": []}, "none given"),
        ({"rank": 0}, "rank: 0"),
        ({"lora_alpha": 0}, "lora_alpha: 0"),
        ({"dropout": 1.0}, r"dropout: 1\.0"),
        ({"vocab_size": 100}, "99 rows, the tokenizer 100 tokens"),
    ],
)
def test_mistakes_are_named(folder: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(folder, **changes)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_quantized_base_is_refused(quantization: str, tiny_model: Any, tmp_path: Path) -> None:
    config = tiny_model("llama").config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized already: set model to an unquantized copy"):
        fresh(str(tmp_path), quantization=quantization)
