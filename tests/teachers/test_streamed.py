"""A streamed teacher says what the whole one says, with one layer in memory and another on its way."""

from __future__ import annotations

import gc
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import UserError
from distill.models.isolation import isolates_documents
from distill.models.shapes import shapes_alone
from distill.models.tensors import Tensors
from teachers.huggingface import load_teacher
from teachers.streamed import StreamedTeacher, load_streamed_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 4
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "gemma2": SLIDING,  # with a soft cap
    "gemma3_text": SLIDING,  # with other rotations in its sliding layers
    "gpt2": {"n_layer": LAYERS},  # layers by another name, weights transposed
    "granite": {},
    "qwen3_moe": {},  # experts that lie in the checkpoint one by one
}


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A family's checkpoint."""
    made: dict[str, str] = {}

    def find(family: str) -> str:
        if family not in made:
            sizes = {"num_hidden_layers": LAYERS} | FAMILIES[family]
            if family == "gpt2":
                del sizes["num_hidden_layers"]
            made[family] = str(tmp_path_factory.mktemp(family))
            tiny_model(family, **sizes).save_pretrained(made[family])
        return made[family]

    return find


def packed_batch(samples: int = 5) -> tuple[Tensor, Tensor]:
    """Rows of three documents, of which the last is longer than a sliding window."""
    ids_BL = torch.randint(99, (samples, 20), generator=torch.Generator().manual_seed(1))
    positions_L = torch.cat([torch.arange(length) for length in (3, 7, 10)])
    return ids_BL, positions_L.repeat(samples, 1)


@torch.no_grad()
def answers(teacher: Any) -> tuple[Tensor, Tensor]:
    hidden_BLD = teacher.body(*packed_batch())
    return hidden_BLD, teacher.head(hidden_BLD)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(answers(one), answers(other), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_the_whole_teacher_says_to_the_bit(folder: Any, family: str, dtype: str) -> None:
    whole, streamed = load_teacher(folder(family), "none", dtype), load_streamed_teacher(folder(family), "none", dtype)
    assert same(streamed, whole)
    assert same(streamed, whole)  # a second batch, whose first layer was read ahead behind the last of the first
    assert same(load_streamed_teacher(folder(family), "none", dtype, keep_layers=2), whole)


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 99])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_micro_batches_say_the_same(folder: Any, family: str, micro_batch: int) -> None:
    whole = load_teacher(folder(family), "none")
    streamed = load_streamed_teacher(folder(family), micro_batch=micro_batch, keep_layers=1)
    for found, expected in zip(answers(streamed), answers(whole), strict=True):
        # Experts multiply the tokens of all samples at once: other sums for fewer samples.
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 if family == "qwen3_moe" else 0)


def test_documents_are_kept_apart_and_windows_slide(folder: Any) -> None:
    teacher = load_streamed_teacher(folder("mistral"))
    assert isolates_documents(teacher, 99, "cpu")
    ids_1L, positions_1L = torch.arange(20)[None], torch.arange(20)[None]
    other_1L = ids_1L.clone()
    other_1L[0, 0] = 50
    changed_L = (teacher.body(ids_1L, positions_1L) != teacher.body(other_1L, positions_1L)).any(dim=-1)[0]
    assert changed_L.nonzero().max() == LAYERS * (4 - 1), "as far as four windows of four tokens reach"


def test_a_checkpoint_in_many_files(folder: Any, tiny_model: Any, tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=LAYERS).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same(load_streamed_teacher(str(tmp_path)), load_teacher(str(tmp_path), "none"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the reads of each tensor. Another test's teacher, whose thread may still read ahead, does not count."""
    counted: Counter[str] = Counter()
    read, make, here = Tensors.read, Tensors.__init__, []

    def counting(self: Tensors, name: str) -> Tensor:
        counted[name] += any(self is each for each in here)
        return read(self, name)

    def making(self: Tensors, *given: Any) -> None:
        here.append(self)
        make(self, *given)

    monkeypatch.setattr(Tensors, "read", counting)
    monkeypatch.setattr(Tensors, "__init__", making)
    return counted


def join(teacher: StreamedTeacher) -> None:
    """Wait for what is being read ahead."""
    assert teacher._stream._ahead is not None
    teacher._stream._ahead[1].exception()


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_batch_reads_each_layer_once(folder: Any, reads: Counter[str], micro_batch: int | None) -> None:
    teacher = load_streamed_teacher(folder("llama"), micro_batch=micro_batch, keep_layers=1)
    outside = {name for name in reads if ".layers." not in name}
    assert {name.split(".")[2] for name in reads if name not in outside} == {"0"} and set(reads.values()) == {1}
    for batch in (1, 2, 3):
        answers(teacher)
        join(teacher)
        first = "model.layers.1."  # has been read for the next batch too
        for name, times in reads.items():
            streamed = name not in outside and not name.startswith("model.layers.0.")
            assert times == (batch + name.startswith(first) if streamed else 1), name


def bytes_alive() -> int:
    storages = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("keep_layers", [0, 3])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_one_layer_is_in_memory_and_one_on_its_way(
    tiny_model: Any, tmp_path: Path, keep_layers: int, micro_batch: int | None
) -> None:
    model = tiny_model("llama", num_hidden_layers=8, intermediate_size=2048)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    rest = sum(parameter.nbytes for parameter in model.parameters()) - 8 * layer
    largest = max(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    gc.collect()  # what other tests left must not be freed in the middle of this one
    before, seen = bytes_alive(), []
    teacher = load_streamed_teacher(
        str(tmp_path), compute_dtype="float32", keep_layers=keep_layers, micro_batch=micro_batch
    )
    assert bytes_alive() - before <= rest + keep_layers * layer + 4096
    for module in teacher.model.model.layers:
        module.mlp.register_forward_pre_hook(lambda *_: seen.append(bytes_alive() - before))
    ids_BL, positions_BL = packed_batch(2)
    teacher.body(ids_BL, positions_BL)
    assert len(seen) == (16 if micro_batch else 8)
    # A tensor that is being read, hidden states and masks, and 512 bytes a tensor for its place in the buffer.
    allowance = largest + 100_000
    assert max(seen) <= rest + (keep_layers + 2) * layer + allowance < rest + (keep_layers + 3.5) * layer
    assert max(seen) >= rest + (keep_layers + 2) * layer
    streamed = [name for name, parameter in teacher.named_parameters() if parameter.is_meta]
    assert len(streamed) == (8 - keep_layers) * 9, "without weights when it is not their turn"


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_an_error_of_the_reading_thread_comes_through_and_passes(
    folder: Any, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None
) -> None:
    whole, streamed = (
        load_teacher(folder("llama"), "none"),
        load_streamed_teacher(folder("llama"), micro_batch=micro_batch),
    )
    threads, read, broken = threading.active_count(), Tensors.read, True

    def breaking(self: Tensors, name: str) -> Tensor:
        if broken and name == "model.layers.2.mlp.up_proj.weight":
            raise OSError("the disk is gone")
        return read(self, name)

    monkeypatch.setattr(Tensors, "read", breaking)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            answers(streamed)
    broken = False
    assert same(streamed, whole)
    assert threading.active_count() <= threads + 1  # the reader; no waiting micro-batch is left behind


def test_an_error_inside_a_layer_comes_through_and_passes(folder: Any) -> None:
    whole, streamed = load_teacher(folder("llama"), "none"), load_streamed_teacher(folder("llama"), micro_batch=2)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 2:  # while the first micro-batch waits at the next layer
            raise RuntimeError("out of memory")

    hook = streamed.model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answers(streamed)
    hook.remove()
    assert len(calls) == 2 and same(streamed, whole)


def test_it_moves_with_its_module_and_keeps_its_type(folder: Any) -> None:
    teacher = load_streamed_teacher(folder("llama"), compute_dtype="float32")
    around = torch.nn.ModuleDict({"teacher": teacher})
    assert same(around.to("cpu")["teacher"], load_teacher(folder("llama"), "none", "float32"))
    with pytest.raises(ValueError, match="set compute_dtype"):
        around.to(torch.bfloat16)


def test_on_a_device_with_its_own_memory_layers_are_copied_there(folder: Any) -> None:
    teacher = load_streamed_teacher(folder("llama"))
    teacher._stream._changes_places = False  # as if the host's buffer were in another memory than the device's
    assert same(teacher, load_teacher(folder("llama"), "none")) and same(teacher, load_teacher(folder("llama"), "none"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_on_a_card_it_says_the_same_in_the_memory_of_one_layer(
    tiny_model: Any, tmp_path: Path, micro_batch: int | None
) -> None:
    sizes = {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 8192}
    tiny_model("llama", **sizes).save_pretrained(tmp_path)
    ids_BL, positions_BL = (tensor.cuda() for tensor in packed_batch())
    whole = load_teacher(str(tmp_path), "none", "bfloat16", "cuda")
    with torch.no_grad():
        expected_BLD = whole.body(ids_BL, positions_BL)
    layer = sum(parameter.nbytes for parameter in whole.model.model.layers[0].parameters())
    del whole
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    streamed = load_streamed_teacher(str(tmp_path), "none", "bfloat16", "cuda", micro_batch=micro_batch)
    for _ in range(2):
        torch.testing.assert_close(streamed.body(ids_BL, positions_BL), expected_BLD, rtol=2e-2, atol=2e-2)
    assert torch.cuda.max_memory_allocated() - before < 2 * layer
    streamed.cpu()  # as Lightning leaves it
    assert torch.cuda.memory_allocated() - before < layer / 2


def test_generation_can_call_the_model_itself(folder: Any) -> None:
    ids_BL, positions_BL = packed_batch()
    teacher, whole = load_streamed_teacher(folder("llama")), load_teacher(folder("llama"), "none")
    with torch.no_grad():
        found, expected = (x.model(input_ids=ids_BL, position_ids=positions_BL).logits for x in (teacher, whole))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "nf4"}, "reads a quantised copy of .*teacher.options.quantized_copy"),
        ({"host_memory": "lots"}, "teacher.options.host_memory: 'lots'"),
        ({"micro_batch": 0}, "micro_batch is 0: give a number of samples"),
        ({"keep_layers": 5}, "keep_layers is 5: .* has 4 layers"),
        ({"keep_layers": -1}, "keep_layers is -1"),
        ({"compute_dtype": "float8"}, "compute_dtype 'float8' is unknown"),
    ],
)
def test_wrong_options_are_refused(folder: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, UserError), match=words):
        load_streamed_teacher(folder("llama"), **options)


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Any, tmp_path: Path) -> None:
    weights = load_file(Path(folder("llama")) / "model.safetensors")
    shutil.copy(Path(folder("llama")) / "config.json", tmp_path)
    lost = "model.layers.2.mlp.up_proj.weight"
    save_file({name: weight for name, weight in weights.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match=f"the checkpoint lacks {lost}"):
        load_streamed_teacher(str(tmp_path))
    save_file({**weights, lost: weights[lost][:1]}, tmp_path / "model.safetensors")  # would broadcast
    with pytest.raises(Exception, match=rf"has {lost} as \[1, \d+\], where its"):
        answers(load_streamed_teacher(str(tmp_path)))


def test_a_forecast_needs_no_weights(folder: Any, tmp_path: Path) -> None:
    """The shape runs on one buffer with whatever is in it, and reads nothing but the configuration."""
    shutil.copy(Path(folder("qwen3")) / "config.json", tmp_path)
    with shapes_alone(lambda *wanted: pytest.fail("nothing is downloaded")):
        shape = load_streamed_teacher(str(tmp_path), keep_layers=1, micro_batch=2)
    assert {name.split(".")[3] for name, p in shape.named_parameters() if "layers" in name and not p.is_meta} == {
        "0",  # kept
        "1",  # in the buffer
    }
    hidden_BLD, logits_BLV = answers(shape)
    assert hidden_BLD.shape == (5, 20, 32) and logits_BLV.shape == (5, 20, 99)
    assert shape.head.weight_VD is shape.model.get_input_embeddings().weight, "tied"
    assert shape._stream._host is None


def test_from_the_command_line_the_cache_is_the_same_to_the_byte(world: Any, distill: Any, tmp_path: Path) -> None:
    file = world.write(tmp_path / "experiment.yaml")
    assert world.content["teacher"]["quantization"] == "none"
    streamed = ["--teacher.class_path", "streamed", "--teacher.options", '{"keep_layers": 1}']
    made = []
    for name, options in {"whole": [], "streamed": streamed}.items():
        folder = tmp_path / name
        distill("cache-teacher", file, "--cache.max_samples", 16, "--cache.dir", folder, *options).done()
        made.append({path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())})
    assert made[0] == made[1] and len(made[0]) == 3
    # A cache that one began, the other may finish: what they say is the same.
    (tmp_path / "streamed/shards/train-000001.safetensors").unlink()
    distill("cache-teacher", file, "--cache.max_samples", 16, "--cache.dir", tmp_path / "streamed").done()
    unknown = distill("cache-teacher", file, *streamed[:2], "--teacher.options", '{"keep_layer": 1}')
    unknown.refused("unknown option 'keep_layer'", "keep_layers")
