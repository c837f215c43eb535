"""Every family's GGUF file makes llama.cpp compute the student's own logits; what it could not compute is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("gguf", reason="the extra gguf is not installed")

from gguf import GGUFReader
from gguf.quants import dequantize

from distill.errors import UserError
from distill.export import gguf, gguf_architecture, gguf_check, gguf_tensors
from distill.models.checkpoints import Checkpoint
from distill.models.huggingface import HuggingFaceLanguageModel
from distill.models.saving import save_language_model
from distill.models.tokenizers import load_tokenizer, vocab_size
from distill.plugins import load_language_model

pytestmark = pytest.mark.usefixtures("one_thread")
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")

ROUNDING = 5e-3
"""‖ours − theirs‖ / ‖ours‖: float16 weights, products and cache (unit 2⁻¹¹) through up to seven layers."""
IDS = [(7 * position * position + 3 * position + 5) % 260 for position in range(60)]


def rope(kind: str, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


SCALED = {"factor": 4.0, "original_max_position_embeddings": 16}
SMALL_GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "moe_intermediate_size": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 283,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases, large heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama 3": ("llama", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **SCALED)),
    "llama, linear": ("llama", rope("linear", factor=4.0)),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, large heads": ("qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, yarn": ("qwen3", rope("yarn", **SCALED)),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "use_sliding_window": False}),
    "ministral3": (
        "ministral3",
        {"head_dim": 16, **rope("yarn", mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.5, **SCALED)},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **rope("yarn", **SCALED),
            "num_hidden_layers": 4,
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
    ),
    **{
        name: (
            "qwen3_5_text",
            {
                "num_hidden_layers": len(kinds),
                "layer_types": [f"{kind}_attention" for kind in kinds],
                "head_dim": 16,
                **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                **rope("default", partial_rotary_factor=0.5),
            },
        )
        for name, kinds in {
            "qwen3_5": ("linear", "linear", "full"),
            "qwen3_5, irregular": ("full", "linear", "full"),
        }.items()
    },
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True, **rope("default", partial_rotary_factor=0.5)}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"num_hidden_layers": 5, "sliding_window": 8}),
    "granite": (
        "granite",
        {"logits_scaling": 3.0, "residual_multiplier": 0.3, "embedding_multiplier": 5.0, "attention_multiplier": 0.2},
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {"num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 3, "attn_logit_softcapping": 2.0},
    ),
    "gemma2, no caps": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    **{
        name: (
            "gemma4_text",
            {
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "head_dim": 8,
                "global_head_dim": 16,
                "sliding_window": 8,
                "final_logit_softcapping": 2.0,
                "vocab_size_per_layer_input": 283,
                **sizes,
            },
        )
        for name, sizes in {
            "gemma4": {"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
            "gemma4, large": {
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 0,
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
            },
        }.items()
    },
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 3}),
    "gemma3, irregular": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": None,
        },
    ),
}


@pytest.fixture(scope="session")
def students(hugging_face_student: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`students("gemma2")`: the folder of a case of `CASES`, made once."""
    root, made = tmp_path_factory.mktemp("gguf"), {}

    def student(case: str) -> Path:
        if case not in made:
            family, sizes = CASES[case]
            made[case] = hugging_face_student(root / f"student{len(made)}", family, **sizes)
        return made[case]

    return student


def ours(student: Path) -> Tensor:
    """The student's log-probabilities after each of `IDS`."""
    model = load_language_model(student)
    rows = vocab_size(load_tokenizer(Checkpoint(student, None, "student")))
    with torch.no_grad():
        logits_LV = model.head.with_rows(rows)(model.body(torch.tensor([IDS]), torch.arange(len(IDS))[None]))[0]
        return torch.log_softmax(logits_LV, -1)


def theirs(student: Path, folder: Path) -> Tensor:
    """llama.cpp's log-probabilities with a file made anew, in a process of its own."""
    gguf.write(student, folder, "f16")
    request = {"file": str(gguf.file(folder, "f16")), "threads": 1, "texts": [], "prompts": [], "new_tokens": 0}
    rows = vocab_size(load_tokenizer(Checkpoint(student, None, "student")))
    places = {"ids": IDS, "places": list(range(len(IDS))), "vocabulary": rows, "logp": str(folder / "logp.npy")}
    gguf_check._ask({**request, **places})
    return torch.from_numpy(np.load(folder / "logp.npy"))


def error(one: Tensor, other: Tensor) -> float:
    """Their distance beside the spread of the logits: log-probabilities have a large mean."""
    return float((one - other).norm() / (one - one.mean(-1, keepdim=True)).norm())


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_students_logits(
    case: str, students: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the loopback is reached past any proxy
    assert error(ours(students(case)), theirs(students(case), tmp_path)) < ROUNDING


@needs_llama_cpp
@pytest.mark.parametrize("case", ["llama, tied", "gemma", "gemma2", "gemma3"])
def test_unconverted_tensors_would_show(
    case: str, students: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_tensors, "convert", lambda plan, name, tensor: tensor)
    assert error(ours(students(case)), theirs(students(case), tmp_path)) > 2 * ROUNDING


@needs_llama_cpp
@pytest.mark.parametrize("case", ["llama 3", "llama, linear", "qwen3, yarn"])
def test_unscaled_positions_would_show(
    case: str, students: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_tensors, "_frequency_factors", lambda plan: None)
    monkeypatch.setattr(gguf_architecture, "_add_scaling", lambda *given: None)
    assert error(ours(students(case)), theirs(students(case), tmp_path)) > 2 * ROUNDING


def test_channels_that_are_rotated_together_become_neighbours() -> None:
    assert gguf_tensors.interleaved_rows(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("type", gguf.TYPES)
def test_each_weight_is_within_half_a_step_of_the_students(
    type: str, students: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = students("qwen3")  # whose tensors go in as they are
    gguf.write(student, tmp_path, type)
    found = tensors(gguf.file(tmp_path, type))
    weights = load_language_model(student).model.state_dict()
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names |= {
        f"blk.1.{new}.weight": f"model.layers.1.{old}.weight"
        for new, old in (
            ("attn_q", "self_attn.q_proj"),
            ("ffn_down", "mlp.down_proj"),
            ("ffn_norm", "post_attention_layernorm"),
        )
    }
    for new, old in names.items():
        stored = found[new]
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).view(*stored.shape.tolist()[::-1])
        wanted = weights[old][: len(values)]
        kind = stored.tensor_type.name
        # A step is a block's largest weight over what the type counts to (8 and 127); float16's is relative.
        if kind == "F32":
            assert torch.equal(values, wanted)
        elif kind == "F16":
            assert torch.allclose(values, wanted, rtol=2.0**-11, atol=1e-7)
        else:
            largest = wanted.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
            steps = {"Q4_0": 8, "Q8_0": 127}[kind]
            # Half a step, and the step's own float16. Q4_0 counts from -8 to 7: its far end is a whole step off.
            off = (1.0 if kind == "Q4_0" else 0.5) + steps * 2.0**-11
            assert ((values - wanted).unflatten(-1, (-1, 32)).abs() <= off * largest / steps).all()
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q8_0"}[type]
    assert kinds["blk.1.attn_q.weight"] == type.upper()
    assert kinds["blk.1.ffn_down.weight"] == "F16"  # rows of 48
    assert ("2 matrices stay at f16" in capsys.readouterr().out) == (type != "f16")


def test_the_same_student_makes_the_same_bytes(students: Callable[[str], Path], tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        gguf.write(students("llama"), tmp_path / name, "q8_0")
        contents.append(gguf.file(tmp_path / name, "q8_0").read_bytes())
    assert contents[0] == contents[1]


def test_rows_that_stand_for_no_token_are_left_out(students: Callable[[str], Path], tmp_path: Path) -> None:
    student = students("llama")
    gguf.write(student, tmp_path, "f16")
    tokens = vocab_size(load_tokenizer(Checkpoint(student, None, "student")))
    assert json.loads((student / "config.json").read_text())["vocab_size"] > tokens
    found = tensors(gguf.file(tmp_path, "f16"))
    assert {int(found[name].shape[1]) for name in gguf.EMBEDDINGS} == {tokens}


def test_a_failure_leaves_nothing_behind(
    students: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(gguf, "_stored", fail)
    with pytest.raises(OSError, match="disk full"):
        gguf.write(students("llama"), tmp_path, "f16")
    assert list(tmp_path.iterdir()) == []


def test_attention_windows_that_llama_cpp_lacks_end_the_context(
    hugging_face_student: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = hugging_face_student(tmp_path / "student", "mistral", sliding_window=24)
    gguf.write(student, tmp_path, "f16")
    fields = GGUFReader(gguf.file(tmp_path, "f16")).fields
    assert fields["llama.context_length"].contents() == 24
    assert "context ends at 24 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "sizes", "words"),
    [
        ("gpt2", {}, "gpt2.*known: llama, mistral"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "each fourth one"),
        ("llama", {"hidden_act": "gelu"}, "silu, not gelu"),
        ("llama", rope("dynamic", factor=2.0), "dynamic.*known: default, linear"),
        ("qwen3", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **SCALED), "llama3"),
        ("qwen3", rope("yarn", beta_fast=16.0, **SCALED), "beta_fast"),
        ("qwen3", {"attention_bias": True}, "no place for the tensor.*bias"),
        ("gemma2", {"tie_word_embeddings": False}, "no place for the tensor lm_head"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "soft cap on attention"),
        (
            "gemma4_text",
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, **SMALL_GEMMA4},
            "with experts",
        ),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 4}, "sum to 1"),
        ("qwen3_5_text", {"linear_key_head_dim": 8, "linear_value_head_dim": 16}, "of one size"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, sizes: dict[str, Any], words: str, hugging_face_student: Any, tmp_path: Path
) -> None:
    student = hugging_face_student(tmp_path / "student", family, **sizes)
    with pytest.raises(UserError, match=words):
        gguf.write(student, tmp_path / "out", "f16")
    assert not [*tmp_path.glob("out/*")]


def test_a_plug_ins_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text("{}")
    with pytest.raises(UserError, match=r"plug-in.*--format hf"):
        gguf.write(tmp_path, tmp_path / "out", "f16")


def test_an_unknown_type_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'q8_0'"):
        gguf.write(tmp_path, tmp_path / "out", "q8")


def test_without_the_package_the_extra_is_named(
    students: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'distill-small-card\[gguf\]'"):
        gguf.write(students("llama"), tmp_path, "f16")


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    made = tokenizer()
    model = HuggingFaceLanguageModel(tiny_model("llama", vocab_size=vocab_size(made) - 1))
    save_language_model(model, tmp_path / "student", "huggingface", {}, made)
    with pytest.raises(UserError, match=r"has 279 rows, the tokenizer 280 tokens"):
        gguf.write(tmp_path / "student", tmp_path / "out", "f16")


@pytest.mark.parametrize(("value", "words"), [(1e5, "beyond the range of f16.*q8_0"), (float("nan"), "no numbers")])
def test_weights_that_f16_cannot_hold_are_refused(
    value: float, words: str, tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    made = tokenizer()
    model = tiny_model("llama", vocab_size=vocab_size(made))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    save_language_model(HuggingFaceLanguageModel(model), tmp_path / "student", "huggingface", {}, made)
    with pytest.raises(UserError, match=words):
        gguf.write(tmp_path / "student", tmp_path / "out", "f16")


def test_ollama_gets_a_description_beside_the_file(
    students: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf.write(students("qwen3"), tmp_path, "q8_0")
    lines = (tmp_path / "Modelfile-q8_0").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["FROM ./model-q8_0.gguf", 'PARAMETER stop "<|im_end|>"']
    context = json.loads((students("qwen3") / "config.json").read_text())["max_position_embeddings"]
    assert lines[2:] == ([f"PARAMETER num_ctx {context}"] if context < 4096 else [])
    assert "in the export's folder: ollama create NAME -f Modelfile-q8_0\n" in capsys.readouterr().out
