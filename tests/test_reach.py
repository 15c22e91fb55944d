"""Which parameters a site depends on, also where they are not in memory."""

import pytest
import tiny
import torch

import geofast as gf
from geofast.models.inputs import text_collate
from geofast.models.reach import reaching

READ = ["embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"]
UNREAD = ["pooler.dense.weight", "pooler.dense.bias"]


def found(module):
    tensors = module.state_dict(keep_vars=True)
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module))
    return reaching(model, ["w1 w2"], {name: tensors[name] for name in (*READ, *UNREAD)})


def test_what_comes_after_the_last_site_is_not_read():
    assert found(tiny.bert()) == READ


def test_what_is_kept_elsewhere_is_read_where_its_module_runs_before_the_last_site():
    accelerate = pytest.importorskip("accelerate")
    module = tiny.bert()
    accelerate.cpu_offload(module, torch.device("cpu"))
    assert all(p.is_meta for p in module.parameters())
    assert found(module) == READ
