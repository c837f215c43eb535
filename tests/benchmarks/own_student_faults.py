"""Sources of students with faults: wrong constructors, heads and bodies, one or several at a time; and a sound one."""

from __future__ import annotations

import random
from dataclasses import dataclass

SOUND = "sound"

TEMPLATE = """
import sys
import numpy
import torch
from torch import nn
from torch.nn import functional
from distill.models.language_model import Head
{module}

class Student(nn.Module):
    def __init__(self, vocab_size: int, size: int = 16{arguments}):
        {first}
        self.tokens = nn.Embedding(vocab_size, size)
        self.mix = nn.Linear(size, size)
        self.wide = nn.Conv1d(size, size, 3, padding=1)
        self.norm = nn.BatchNorm1d(size)
        self.zero = nn.Parameter(torch.zeros(size, size))
        self.listed = [nn.Linear(size, size)]
        self.blocks = nn.ModuleList([nn.Identity()])
        self.state = 0
        {last}

    {head}

    {body}
{after}
"""
CONSTRUCTORS: dict[str, dict[str, str]] = {
    SOUND: {},
    "no super": {"first": "pass"},
    "ValueError": {"last": "raise ValueError('no such size')"},
    "ValueError of two lines": {"last": "raise ValueError('no such size\\nTraceback')"},
    "no text": {"last": "raise AssertionError"},
    "KeyError": {"last": "{}['size']"},
    "division": {"last": "size / 0"},
    "name": {"last": "self.x = undefined_name"},
    "attribute": {"last": "self.x = self.nothing.there"},
    "sizes": {"last": "self.mix(torch.zeros(3, size + 1))"},
    "recursion": {"last": "self.__init__(vocab_size)"},
    "exit": {"last": "sys.exit(0)"},
    "exit with text": {"last": "sys.exit('bye')"},
    "own exception": {"module": "class Strange(Exception): pass", "last": "raise Strange()"},
    "argument without a value": {"arguments": ", depth=None, *, width: int"},
    "body is None": {"last": "self.body = None"},
    "all frozen": {"last": "self.requires_grad_(False)"},
    "nan weights": {"last": "self.tokens.weight.data.fill_(float('nan'))"},
    "half the tokens": {"first": "super().__init__(); vocab_size //= 2"},
    "text in colours": {"last": "raise ValueError('\\x1b[31mno\\x1b[0m such\\r size')"},
    "a text of a megabyte": {"last": "raise ValueError('x' * 1_000_000)"},
    "a warning as error": {"last": "import warnings; warnings.simplefilter('error'); warnings.warn('old')"},
    "KeyboardInterrupt's kind": {"module": "class Strange(BaseException): pass", "last": "raise Strange('x')"},
    "an exception that cannot be printed": {
        "module": "class Strange(Exception):\n    def __str__(self): raise ValueError('no')",
        "last": "raise Strange",
    },
    "an option without a use": {"arguments": ", depth: int"},
    "weights without memory": {"last": "self.to('meta')"},
    "infinite weights": {"last": "self.tokens.weight.data.fill_(float('inf'))"},
    "a weight of whole numbers": {"last": "self.ids = nn.Parameter(torch.zeros(3).long())"},
    "no weights": {"after": "class Student(nn.Module):\n    def __init__(self, vocab_size: int): super().__init__()"},
    "missing package": {"module": "import no_such_package_here"},
    "syntax": {"module": "def broken(:"},
    "indentation": {"module": "if True:\npass"},
    "import ends the program": {"module": "sys.exit(3)"},
    "import raises": {"module": "raise RuntimeError('not today')"},
    "no such class": {"after": "del Student"},
    "a number": {"after": "Student = 3"},
    "a class without arguments": {"after": "Student = dict"},
    "a plain class": {"after": "class Student:\n    def __init__(self): pass"},
    "a function of None": {"after": "def Student(vocab_size): pass"},
    "a function of two": {"after": "Made = Student\ndef Student(vocab_size): return Made(vocab_size), 1"},
    "a class, not an object": {"after": "Made = Student\ndef Student(vocab_size): return Made"},
}
HEADS: dict[str, str] = {
    SOUND: "return Head(self.tokens.weight)",
    "None": "return None",
    "tensor": "return self.tokens.weight",
    "module": "return self.mix",
    "ValueError": "raise ValueError('no head today')",
    "AttributeError": "return Head(self.output.weight)",
    "transposed": "return Head(self.tokens.weight.T)",
    "one row": "return Head(self.tokens.weight[0])",
    "whole numbers": "return Head(self.tokens.weight.long())",
    "None as weight": "return Head(None)",
    "bias of another size": "return Head(self.tokens.weight, self.zero[0])",
    "bias is a number": "return Head(self.tokens.weight, 0.0)",
    "scale 0": "return Head(self.tokens.weight, scale=0)",
    "scale nan": "return Head(self.tokens.weight, scale=float('nan'))",
    "scale is text": "return Head(self.tokens.weight, scale='2')",
    "soft cap 0": "return Head(self.tokens.weight, soft_cap=0)",
    "soft cap below 0": "return Head(self.tokens.weight, soft_cap=-30.0)",
    "few rows": "return Head(self.tokens.weight[:7])",
    "other size": "return Head(self.tokens.weight[:, :5])",
    "detached": "return Head(self.tokens.weight.detach())",
    "data": "return Head(self.tokens.weight.data)",
    "drawn anew": "return Head(torch.randn_like(self.tokens.weight))",
    "a copy": "return Head(self.tokens.weight.detach().clone())",
    "infinite": "return Head(self.tokens.weight * float('inf'))",
    "without memory": "return Head(self.tokens.weight.to('meta'))",
    "sparse": "return Head(self.tokens.weight.to_sparse())",
    "complex": "return Head(torch.complex(self.tokens.weight, self.tokens.weight))",
    "three dimensions": "return Head(self.tokens.weight[None])",
    "no rows": "return Head(self.tokens.weight[:0])",
    "no columns": "return Head(self.tokens.weight[:, :0])",
    "an array": "return Head(self.tokens.weight.detach().numpy())",
    "scale infinite": "return Head(self.tokens.weight, scale=float('inf'))",
    "scale is a tensor": "return Head(self.tokens.weight, scale=self.zero)",
    "soft cap nan": "return Head(self.tokens.weight, soft_cap=float('nan'))",
    "bias nan": "return Head(self.tokens.weight, torch.full((len(self.tokens.weight),), float('nan')))",
    "bias of the wrong shape": "return Head(self.tokens.weight, self.tokens.weight)",
    "another at each call": "self.state += 1; return Head(self.tokens.weight * self.state)",
    "recursion": "return self.head",
    "a tuple": "return self.tokens.weight, None",
    "exit": "sys.exit(1)",
}
ODD_HEADS: dict[str, str] = {
    "a method": "def head(self):\n        return Head(self.tokens.weight)",
    "none": "",
    "a wrong class": "head = Head",
}
BODIES: dict[str, str] = {
    SOUND: "return x",
    "sound mix": "return x + self.mix(x)",
    "sound auxiliary": "return x, x.pow(2).sum()",
    "None": "pass",
    "ids": "return input_ids",
    "whole numbers": "return x.long()",
    "complex": "return torch.complex(x, x)",
    "array": "return x.detach().numpy()",
    "list": "return [x]",
    "dict": "return {'last_hidden_state': x}",
    "tuple of one": "return (x,)",
    "tuple of three": "return x, x.sum(), x.sum()",
    "tuple with text": "return x, 'loss'",
    "tuple with a vector": "return x, x.sum((1, 2))",
    "tuple with a number": "return x, 0.1",
    "tuple of Nones": "return None, None",
    "generator": "yield x",
    "logits": "return x @ self.tokens.weight.T",
    "transposed": "return x.transpose(0, 1)",
    "last position": "return x[:, -1]",
    "one position less": "return x[:, :-1]",
    "mean": "return x.mean()",
    "another dimension": "return x[None]",
    "smaller": "return x[..., :5]",
    "nan": "return x * float('nan')",
    "infinite": "return x / 0",
    "ValueError": "raise ValueError('no body today')",
    "KeyError": "return {}[3]",
    "sizes": "return self.mix(x[..., :3])",
    "name": "return undefined_name",
    "attribute": "return self.nothing(x)",
    "StopIteration": "return next(iter([]))",
    "NotImplementedError": "raise NotImplementedError",
    "exit": "sys.exit(2)",
    "recursion": "return self.body(input_ids, position_ids)",
    "calls None": "return self.blocks[0](x)(x)",
    "assertion": "assert len(x) == 1; return x",
    "one row only": "return x.view(1, -1, 16)",
    "long positions": "return x + functional.embedding(position_ids + 10_000, self.tokens.weight)",
    "no gradient": "return x.detach() + self.zero.detach().sum()",
    "under no_grad": "return functional.layer_norm(x, (16,)).detach()",
    "weights in a list": "return x + self.listed[0](x)",
    "a new layer": "return nn.Linear(16, 16)(x)",
    "next token": "return x + x.roll(-1, 1)",
    "mean over positions": "return x + x.mean(1, keepdim=True)",
    "wide convolution": "return x + self.wide(x.transpose(1, 2)).transpose(1, 2)",
    "attention without a mask": "return x + functional.scaled_dot_product_attention(x, x, x)",
    "next token behind zero": "return x + x.roll(-1, 1) @ self.zero",
    "flip": "return x.flip(1)",
    "mean over rows": "return x + x.mean(0, keepdim=True)",
    "row above": "return x + x.roll(1, 0)",
    "batch norm": "return self.norm(x.flatten(0, 1)).view_as(x)",
    "ids in place": "input_ids.clamp_(max=3); return x",
    "positions in place": "position_ids.zero_(); return x",
    "random": "return x + torch.rand(())",
    "numpy's random": "return x * numpy.random.rand()",
    "dropout left on": "return functional.dropout(x, 0.2)",
    "routing": "return torch.where(torch.rand(x.shape[:2])[..., None] < 0.5, x, self.mix(x))",
    "state": "self.state = self.state + x.mean().detach(); return x + self.state",
    "sparse": "return x.to_sparse()",
    "without memory": "return x.to('meta')",
    "auxiliary nan": "return x, x.sum() * float('nan')",
    "auxiliary complex": "return x, torch.complex(x, x).sum()",
    "auxiliary of whole numbers": "return x, x.long().sum()",
    "auxiliary is True": "return x, True",
    "a vector more": "return torch.cat([x, x[:, :1]], 1)",
    "no positions": "return x[:, :0]",
    "no columns": "return x[..., :0]",
    "mean of the future": "return x + x.flip(1).cumsum(1).flip(1)",
    "last token": "return x + x[:, -1:]",
    "largest of the row": "return x + x.amax(1, keepdim=True)",
    "norm over positions": "return x / x.norm(dim=1, keepdim=True)",
    "length of the row": "return x * input_ids.shape[1] * (input_ids[:, -1:, None] % 7 + 1)",
    "sorted": "return x.sort(1).values",
    "of the batch's size": "return x * len(x)",
    "cleared gradient": "return x.clone().detach_()",
    "threads": "import threading; threading.Thread(target=int).start(); raise RuntimeError('x')",
    "time": "import time; return x * (time.perf_counter_ns() % 1000)",
    "weights in place": "self.tokens.weight.data.mul_(0.9); return x",
}
ODD_BODIES: dict[str, str] = {
    "one argument": "def body(self, input_ids):\n        return self.tokens(input_ids)",
    "three arguments": "def body(self, input_ids, position_ids, mask):\n        return self.tokens(input_ids)",
    "by name only": "def body(self, *, input_ids, position_ids):\n        return self.tokens(input_ids)",
    "no self": "def body(input_ids, position_ids):\n        return input_ids",
    "async": "async def body(self, input_ids, position_ids):\n        return self.tokens(input_ids)",
    "a tensor": "body = torch.zeros(3)",
    "a module": "body = nn.Identity()",
    "a static method": "@staticmethod\n    def body(input_ids, position_ids):\n        return input_ids",
    "a class method": "@classmethod\n    def body(cls, input_ids, position_ids):\n        return cls.tokens(input_ids)",
    "forward alone": "def forward(self, input_ids, position_ids):\n        return self.tokens(input_ids)",
    "None": "body = None",
    "a property": "@property\n    def body(self):\n        raise ValueError('later')",
}


@dataclass(frozen=True)
class Case:
    """One student: the names of its constructor, head and body in the tables."""

    constructor: str = SOUND
    head: str = SOUND
    body: str = SOUND

    @property
    def is_sound(self) -> bool:
        return self.constructor == self.head == SOUND and self.body.startswith(SOUND)

    def source(self) -> str:
        """Return the file of the student, of class `Student`."""
        parts = {"module": "", "arguments": "", "first": "super().__init__()", "last": "pass", "after": ""}
        parts |= CONSTRUCTORS[self.constructor]
        head = ODD_HEADS.get(self.head)
        if head is None:
            head = f"@property\n    def head(self):\n        {HEADS[self.head]}"
        body = ODD_BODIES.get(self.body)
        if body is None:
            start = "def body(self, input_ids, position_ids):\n        x = self.tokens(input_ids)\n        "
            body = start + BODIES[self.body]
        return TEMPLATE.format(**parts, head=head, body=body)


def single_faults() -> list[Case]:
    """Return every table entry with all else sound."""
    return [
        *(Case(constructor=name) for name in CONSTRUCTORS),
        *(Case(head=name) for name in (*HEADS, *ODD_HEADS) if name != SOUND),
        *(Case(body=name) for name in (*BODIES, *ODD_BODIES) if name != SOUND),
    ]


def random_faults(number: int, seed: int) -> list[Case]:
    """Return cases of two or three faults."""
    draw = random.Random(seed)
    tables = list(CONSTRUCTORS), [*HEADS, *ODD_HEADS], [*BODIES, *ODD_BODIES]
    return [Case(*(draw.choice(table) for table in tables)) for _ in range(number)]
