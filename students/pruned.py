"""A student cut out of its teacher: some of its layers, heads, neurons and channels, with their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from distill.models.checkpoints import Checkpoint, load_config, resolve
from distill.models.dequantized import check_format
from distill.models.huggingface import (
    HuggingFaceLanguageModel,
    from_weights,
    quiet_transformers,
    shape_of,
)
from distill.models.shapes import declare, finder
from distill.models.stored_types import check_stored_types
from distill.models.streaming import Source
from distill.models.tensors import tensors
from students.pruning_check import check_against_teacher, counts_of_layers, of_all_layers, refuse_layers_elsewhere
from students.pruning_importance import Importance, Samples, Wanted, measure
from students.pruning_kept import kept_importance
from students.pruning_sizes import candidate_sizes
from students.pruning_stream import COMPUTED, LAYER, InMemory, LayerwiseTeacher, split_name
from students.pruning_width import Narrowing, Widths, largest, narrowed_widths

ENDS_IN_FULL = ("gemma4_text",)
"""Families whose last layer sees the whole text, whatever its configuration says."""
FirstSamples = Callable[[int], tuple[Tensor, Tensor, Tensor]]
"""The first samples of the corpus, so many: input_ids int64, position_ids int64, loss_mask bool, each `[B, L]`."""


@declare(
    pretrained="teacher",
    candidates=candidate_sizes,
    sizes=("layers", "depth", "hidden_size", "intermediate_size", "key_value_groups", "experts"),
)
def prune_teacher(
    teacher: str,
    layers: int | list[int] | None = None,
    depth: Literal["even", "importance"] = "even",
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    key_value_groups: int | None = None,
    experts: int | None = None,
    calibration_samples: int = 16,
    teacher_revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    first_samples: FirstSamples | None = None,
    measured: str | None = None,
) -> HuggingFaceLanguageModel:
    """Make the teacher smaller, in float32, as an ordinary model of its family. A size not given stays the teacher's.

    layers: how many, or which ones, counted from 0.
    depth: which layers a number means: `even`, evenly spaced with the first and the last among them; `importance`,
    those without which the teacher's distribution changes most, each skipped alone on `calibration_samples` samples.
    hidden_size, intermediate_size (neurons of an MLP), key_value_groups (key-value heads, each with all the query
    heads that share it): the most active ones on `calibration_samples` samples stay.
    experts: of each layer of a mixture, those that tokens of these samples choose most often.

    Only the kept weights stay in memory: the teacher is read tensor by tensor, and measured layer by layer on `device`
    (a GGUF file is dequantised whole). What was measured is kept in the folder `measured` for the next student.
    `teacher`, its revision, `device`, `first_samples` and `measured` come from the pipeline.
    """
    config, checkpoint = _open(teacher, teacher_revision, trust_remote_code)
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "key_value_groups": key_value_groups,
        "experts": experts,
    }
    is_narrower = any(size is not None for size in sizes.values())
    if layers is None and not is_narrower:
        raise ValueError(f"give at least one of layers, {', '.join(sizes)}")
    if depth == "importance" and not isinstance(layers, int):
        raise ValueError("depth: importance chooses the layers, so layers must be the number of them to keep")
    total = _layers(config)
    chosen = chosen_layers(total if layers is None else layers, total)
    if config.model_type in ENDS_IN_FULL and depth == "even":
        _check_last(config, chosen)
    widths, narrowing = None, None
    if depth == "importance" or is_narrower:
        widths = narrowed_widths(config, **sizes)
        _check_family(pruned_config(config, chosen, widths), widths)
    if finder() is not None:  # a forecast, for which any layers, neurons and channels are as good
        made = pruned_config(config, chosen, widths)
        return HuggingFaceLanguageModel(shape_of(made, torch.float32, trust_remote_code))
    check_stored_types(checkpoint)
    source: Source = tensors(checkpoint)
    if len(chosen) < total:
        refuse_layers_elsewhere(source.names(), total, pruned_config(config, chosen), trust_remote_code)
    if widths is not None:
        source = InMemory(pruned_config(config, list(range(total))), source, trust_remote_code)
        wanted = _wanted(Widths.of(config), widths, depth == "importance" and len(chosen) < total)
        importance = Importance()
        if wanted != Wanted():
            whole = pruned_config(config, list(range(total)))  # plain: without a quantization config
            samples = _samples(first_samples, calibration_samples)
            importance = kept_importance(
                measured,
                checkpoint,
                samples,
                wanted,
                lambda wanted: measure(LayerwiseTeacher(whole, source, device, trust_remote_code), samples, wanted),
            )
        if importance.depth_I is not None:
            if config.model_type in ENDS_IN_FULL:
                importance.depth_I[-1] = torch.inf
            chosen = largest(importance.depth_I, len(chosen)).tolist()  # all at once, after one measurement
        narrowing = _narrowing(config, widths, importance, chosen)
    weights = pruned_weights(source, chosen, narrowing, config)
    made = pruned_config(config, chosen, widths)
    student = HuggingFaceLanguageModel(_build(made, weights, teacher, trust_remote_code))
    student.check()
    if len(chosen) < total:
        check_against_teacher(student, pruned_config(config, list(range(total)), widths), chosen, trust_remote_code)
    return student


def _open(teacher: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Checkpoint]:
    """Return configuration and checkpoint of a teacher that can be pruned."""
    checkpoint = resolve(teacher, revision, trust_remote_code)
    check_format(checkpoint)
    config = load_config(checkpoint, trust_remote_code)
    if config.get_text_config() is not config:
        raise ValueError(f"{teacher} is multimodal: pruning knows text models only")
    if checkpoint.gguf_file is None and getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"the weights of {teacher} are quantized: set teacher to an unquantized copy to prune it")
    return config, checkpoint


def _check_last(config: Any, chosen: list[int]) -> None:
    """Raise ValueError for a last layer that the family's code would make another one of."""
    kinds = config.layer_types
    if kinds[chosen[-1]] != "full_attention":
        full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        raise ValueError(
            f"layers: the last layer of a {config.model_type} sees the whole text, and layer {chosen[-1]} does not: "
            f"end with one of {full}"
        )


def _layers(config: Any) -> int:
    """Return the number of layers. Raises ValueError for a family that does not count them as decoders do."""
    try:
        total = int(config.num_hidden_layers)
        copy.deepcopy(config).num_hidden_layers = total  # a family of encoder and decoder has no such number to set
        return total
    except (AttributeError, NotImplementedError, TypeError):
        raise ValueError(f"{config.model_type} is no decoder with a number of layers: it cannot be pruned") from None


def chosen_layers(layers: int | list[int], total: int) -> list[int]:
    """Return the indices of the layers to keep, in ascending order."""
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(f"layers: {layers} is out of range; the teacher has {total} layers")
        gaps = max(layers - 1, 1)
        return [(2 * index * (total - 1) + gaps) // (2 * gaps) for index in range(layers)]  # rounded half up
    wrong = [index for index in layers if not 0 <= index < total]
    if wrong or not layers:
        raise ValueError(f"layers: {wrong or layers} out of range; the teacher's layers are 0 to {total - 1}")
    if len(set(layers)) != len(layers) or sorted(layers) != layers:
        raise ValueError(f"layers: {layers} must ascend, each layer once")
    return layers


def _check_family(config: Any, widths: Widths) -> None:
    """Raise ValueError, before anything is measured, for sizes that the family cannot load again."""
    try:
        config.validate()
    except Exception as error:  # transformers raises errors of several kinds here
        heads = widths.groups * widths.heads_per_group
        rest = widths.hidden % heads
        if rest == 0:
            raise ValueError(f"{config.model_type} has no such sizes: {error.__cause__ or error}") from None
        near = [size for size in (widths.hidden - rest, widths.hidden - rest + heads) if size]
        raise ValueError(
            f"hidden_size: {widths.hidden} is not a multiple of the {heads} heads, which {config.model_type} asks for; "
            f"nearest: {' or '.join(map(str, near))}"
        ) from None


def _wanted(teacher: Widths, student: Widths, depth: bool) -> Wanted:
    """Return what to measure: only the dimensions that are cut."""
    return Wanted(
        depth=depth,
        hidden=student.hidden < teacher.hidden,
        groups=student.groups < teacher.groups,
        neurons=student.intermediate < teacher.intermediate,
        experts=student.experts < teacher.experts,
    )


def _samples(first_samples: FirstSamples | None, count: int) -> Samples:
    if first_samples is None:
        raise ValueError("importance is measured on samples of the corpus: give first_samples (the pipeline does)")
    if count < 1:
        raise ValueError(f"calibration_samples: {count} is out of range: at least 1")
    samples = Samples(*first_samples(count))
    if samples.input_ids_BL.shape[0] != count:
        found = samples.input_ids_BL.shape[0]
        raise ValueError(f"calibration_samples: {count}, but the corpus has {found} training samples")
    return samples


def _narrowing(config: Any, student: Widths, importance: Importance, chosen: list[int]) -> Narrowing:
    """Choose the most important units: neurons and groups in each layer, channels over all the layers that stay."""
    hidden = importance.hidden_ID

    def in_each(scores_I: Tensor | None, count: int) -> list[Tensor] | None:
        return None if scores_I is None else [largest(scores, count) for scores in scores_I]

    return Narrowing(
        config.model_type,
        Widths.of(config),
        hidden=None if hidden is None else largest(hidden[[*chosen, -1]].sum(dim=0), student.hidden),
        groups=in_each(importance.groups_IG, student.groups),
        neurons=in_each(importance.neurons_IF, student.intermediate),
        experts=in_each(importance.experts_IE, student.experts),
    )


def pruned_config(config: Any, chosen: list[int], widths: Widths | None = None) -> Any:
    """Return the teacher's configuration with fewer layers. Lists with one entry a layer (`layer_types`) shrink too."""
    pruned = copy.deepcopy(config)
    for name, value in counts_of_layers(config, chosen).items():
        setattr(pruned, name, value)
    for name, value in ({} if widths is None else widths.as_config(config)).items():
        setattr(pruned, name, value)
    if hasattr(pruned, "quantization_config"):
        del pruned.quantization_config
    return pruned


def pruned_weights(
    source: Source, chosen: list[int], narrowing: Narrowing | None = None, config: Any = None
) -> dict[str, Tensor]:
    """Return the kept tensors under their new names, in float32, cut by `narrowing` if given. No others are read.

    `config`: the teacher's, of which some families have tensors with a part for every layer.
    """
    renumbered = {old: new for new, old in enumerate(chosen)}
    kept: dict[str, Tensor] = {}
    for name in source.names():
        layer, local = split_name(name)
        if layer is not None and layer not in renumbered:
            continue
        new = name if layer is None else LAYER.sub(rf"\g<1>.{renumbered[layer]}.", name, count=1)
        if narrowing is None:
            kept[new] = _float32(of_all_layers(source.read(name), name, config, chosen))
        elif not local.endswith(COMPUTED):
            kept[new] = _float32(narrowing.slice(of_all_layers(source.read(name), name, config, chosen), local, layer))
    return kept


def _float32(tensor: Tensor) -> Tensor:
    """Convert a tensor at once, so that the built model takes it as it is and no second copy of all weights exists."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _build(config: Any, weights: dict[str, Tensor], teacher: str, trust_remote_code: bool) -> Any:
    """Load through transformers, which knows how a family's names on disk differ from those in memory."""
    import transformers

    with quiet_transformers(), torch.device("meta"):  # for its class only
        empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return from_weights(type(empty), config, weights, torch.float32, f"pruned {teacher}")
