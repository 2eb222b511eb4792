import pytest
import torch
from torch import nn

from tests.parallel.toy import Toy, unsharded_losses
from torchrec_sid.errors import SidError
from torchrec_sid.parallel.embedding_tables import find_tables, table_parameters
from torchrec_sid.parallel.optimizer import TableOptimizer


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (TableOptimizer("sgd", lr=0.5), {"lr": 0.5}),
        (TableOptimizer("adagrad", lr=0.5, eps=1e-3), {"lr": 0.5, "eps": 1e-3}),
        (TableOptimizer("adam", betas=(0.5, 0.6)), {"lr": 0.02, "eps": 1e-8, "betas": (0.5, 0.6)}),
    ],
)
def test_arguments(optimizer, expected):
    assert optimizer.arguments == expected
    optimizer.arguments["optimizer"] = 1  # as TorchRec's sharders do
    assert optimizer.arguments == expected


def test_marking_attaches_the_optimizer_to_every_table():
    model = Toy()
    TableOptimizer("adagrad", lr=0.3).mark(table_parameters(model, find_tables(model)).values())
    marked = [name for name, p in model.named_parameters() if hasattr(p, "_in_backward_optimizers")]
    assert len(marked) == 3
    parameter = model.get_parameter(marked[0])
    assert parameter._optimizer_classes == [torch.optim.Adagrad]
    assert parameter._optimizer_kwargs[0]["lr"] == 0.3


def test_every_field_changes_training():
    base = unsharded_losses(TableOptimizer("adagrad", lr=0.1), 8, 3)
    for other in (
        TableOptimizer("sgd", lr=0.1),
        TableOptimizer("adagrad", lr=0.2),
        TableOptimizer("adagrad", lr=0.1, eps=0.1),
        TableOptimizer("adam", lr=0.1),
    ):
        assert unsharded_losses(other, 8, 3) != base
    adam = unsharded_losses(TableOptimizer("adam", lr=0.1), 8, 3)
    assert unsharded_losses(TableOptimizer("adam", lr=0.1, betas=(0.1, 0.2)), 8, 3) != adam


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TableOptimizer("adamw"), "It is one of sgd, adagrad, rowwise_adagrad"),
        (lambda: TableOptimizer(lr=0), "table_optimizer.lr: 0"),
        (lambda: TableOptimizer(eps=-1), "table_optimizer.eps: -1"),
        (lambda: TableOptimizer(betas=(1.0, 0.9)), "Each is 0 to below 1"),
        (lambda: TableOptimizer("partial_rowwise_adam").factory(), "exists only fused"),
        (
            lambda: TableOptimizer("adam").require_device("cpu"),
            "On a CPU use sgd, adagrad, rowwise_adagrad",
        ),
    ],
)
def test_impossible_optimizers(build, message):
    with pytest.raises(SidError, match=message):
        build()


def test_devices():
    TableOptimizer("adam").require_device("cuda")
    TableOptimizer("rowwise_adagrad").require_device("cpu")
    assert isinstance(TableOptimizer("sgd").factory()([nn.Parameter(torch.ones(1))]), torch.optim.SGD)
