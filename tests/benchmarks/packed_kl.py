"""KL of a teacher's distributions in packed samples from those that it gives with each document alone and whole.

python tests/benchmarks/packed_kl.py CORPUS [--length 256] [--samples 24] [--teacher smollm2-135m-demo]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from distill.corpus import SampleSets, open_corpus
from distill.experiment.configuration import Experiment
from distill.experiment.place import Place
from distill.experiment.teacher import Teacher
from distill.experiment.teacher_sections import CorpusConfig, TeacherConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--teacher", default="smollm2-135m-demo")
    options = parser.parse_args()
    config = TeacherConfig(options.teacher, quantization="none", compute_dtype="float32")
    teacher = Teacher(Experiment(CorpusConfig("", sequence_length=options.length), config), Place.host())
    model, tokenizer = teacher.load(), teacher.tokenizer
    whole = open_corpus(options.corpus, tokenizer, sequence_length=4096, pack="none", long="skip", held_out=0)
    alone = {int(whole.train[number]["document_hash"][0]): number for number in range(len(whole.train))}
    for pack in ("documents", "stream"):
        sets = open_corpus(options.corpus, tokenizer, sequence_length=options.length, pack=pack, held_out=0)
        found = list(_kls(model, sets, whole, alone, options.samples, teacher.vocab_size))
        for is_cut, name in ((False, "begin their document"), (True, "lie behind a cut")):
            kls = torch.cat([torch.empty(0), *(kl for cut, kl in found if cut is is_cut)])
            if len(kls):
                print(f"{pack}: {len(kls):,} positions that {name}: KL {kls.mean():.1e} nats, largest {kls.max():.1e}")


def _kls(
    model: torch.nn.Module, sets: SampleSets, whole: SampleSets, alone: dict[int, int], count: int, vocab_size: int
) -> Iterator[tuple[bool, Tensor]]:
    """Yield the KL in nats at the learned positions of each piece that stands in one place of its document.

    In front stands True for a piece that does not begin there.
    """
    for number in range(count):
        sample = sets.train[number]
        packed = _log_probs(model, sample["input_ids"], sample["position_ids"], vocab_size)
        starts = [*(sample["position_ids"] == 0).nonzero().flatten().tolist(), len(packed)]
        for begin, end in pairwise(starts):
            if (found := alone.get(int(sample["document_hash"][begin]))) is None:
                continue
            document = whole.train[found]
            length = int((document["document_hash"] != 0).sum())
            places = document["input_ids"][:length].unfold(0, end - begin, 1)
            matching = (places == sample["input_ids"][begin:end]).all(1).nonzero().flatten()
            mask = sample["loss_mask"][begin:end]
            if len(matching) != 1 or not mask.any():  # a piece with its first turns again
                continue
            at = int(matching[0])
            lone = _log_probs(model, document["input_ids"][:length], document["position_ids"][:length], vocab_size)
            lone, ours = lone[at : at + end - begin][mask], packed[begin:end][mask]
            yield at > 0, (lone.exp() * (lone - ours)).sum(-1)


@torch.no_grad()
def _log_probs(model: torch.nn.Module, ids_L: Tensor, positions_L: Tensor, vocab_size: int) -> Tensor:
    hidden_LD = model.body(ids_L[None], positions_L[None])[0]
    return model.head.with_rows(vocab_size)(hidden_LD).float().log_softmax(-1)


if __name__ == "__main__":
    main()
