"""order="overlapped": the teacher's forward is queued on a side stream, and what it gave is read after it was waited for."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from hookdistill import Distiller, Match
from hookdistill.side_stream import SideStream

BATCH = torch.linspace(-1, 1, 32).view(4, 8)
MATCHES = [Match("0", "0"), Match("3", "3", loss="kl"), Match("2", "2", loss="cosine")]


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 5))


def pair():
    return net(0), net(1)


def outcome(distiller, batch=BATCH):
    losses = distiller(batch)
    losses.total.backward()
    return [losses.total.detach(), *(p.grad for p in distiller.student.parameters())]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Streams:
    """Stands for ``torch.cuda``, and notes what waits for what and which stream is current."""

    def __init__(self):
        self.noted, self.current, self.made = [], "main", 0

    def get_device_module(self, device):
        return self

    def Stream(self, device):
        self.made += 1
        return _Stream(self, "side")

    def current_stream(self, device):
        return _Stream(self, self.current)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def note(self, what):
        return lambda *_: self.noted.append(f"{what} on {self.current}")


class _Stream:
    def __init__(self, streams, name):
        self.streams, self.name = streams, name

    def wait_stream(self, other):
        self.streams.noted.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def streams(monkeypatch):
    found = Streams()
    monkeypatch.setattr(torch, "get_device_module", found.get_device_module)
    monkeypatch.setattr("hookdistill.distiller.has_streams", lambda device: True)
    return found


def noting(streams, teacher, student, **settings):
    teacher.register_forward_pre_hook(streams.note("teacher"))
    student.register_forward_pre_hook(streams.note("student"))
    distiller = Distiller(teacher, student, MATCHES, example_batch=BATCH, **settings)
    streams.noted.clear()
    return distiller


OVERLAPPED = ["side waits for main", "teacher on side", "student on main", "main waits for side"]


def test_the_teacher_runs_on_the_side_and_is_waited_for_before_the_losses(streams, monkeypatch):
    distiller = noting(streams, *pair(), order="overlapped")
    compute = distiller.loss.forward
    monkeypatch.setattr(
        distiller.loss, "forward", lambda *args, **kwargs: (streams.note("losses")(), compute(*args, **kwargs))[1]
    )
    found = outcome(distiller)
    assert streams.noted == [*OVERLAPPED, "losses on main"]
    assert_same(found, outcome(Distiller(*pair(), MATCHES, order="teacher first")))


def test_one_stream_serves_all_steps(streams):
    distiller = noting(streams, *pair(), order="overlapped")
    for _ in range(3):
        outcome(distiller)
    assert streams.noted == 3 * OVERLAPPED and streams.made == 1


def test_a_copy_makes_a_stream_of_its_own(streams):
    distiller = noting(streams, *pair(), order="overlapped")
    outcome(distiller)
    outcome(copy.deepcopy(distiller))
    assert streams.made == 2


@pytest.mark.parametrize("order", ["student first", "teacher first"])
def test_other_orders_use_no_stream(streams, order):
    distiller = noting(streams, *pair(), order=order)
    outcome(distiller)
    assert streams.made == 0 and set(streams.noted) == {"teacher on main", "student on main"}


def test_models_that_share_a_weight_do_not_overlap(streams):
    teacher, student = pair()
    student[0].weight = teacher[0].weight
    distiller = noting(streams, teacher, student, order="overlapped")
    outcome(distiller)
    assert streams.noted == ["teacher on main", "student on main"]


def test_what_a_failed_teacher_has_queued_is_waited_for(streams):
    distiller = noting(streams, *pair(), order="overlapped")
    with pytest.raises(RuntimeError), SideStream(torch.device("cpu")).fork():
        raise RuntimeError
    assert streams.noted == ["side waits for main", "main waits for side"] and streams.current == "main"
    del distiller


def test_a_teacher_is_waited_for_also_when_the_student_fails(streams):
    teacher, student = pair()
    distiller = noting(streams, teacher, student, order="overlapped")
    handle = student[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distiller(BATCH)
    handle.remove()
    assert streams.noted == OVERLAPPED


def test_on_the_cpu_it_is_teacher_first():
    assert_same(
        outcome(Distiller(*pair(), MATCHES, order="overlapped")), outcome(Distiller(*pair(), MATCHES, order="teacher first"))
    )


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: streams")
def test_on_a_cuda_device_every_step_is_that_of_teacher_first(impl):
    """Large enough that a read before its time, or memory given out again too early, would show."""
    trajectories = {}
    for order in ("overlapped", "teacher first"):
        torch.manual_seed(0)
        teacher = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(24))).cuda()
        student = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))).cuda()
        where = []
        teacher.register_forward_pre_hook(lambda *_, where=where: where.append(torch.cuda.current_stream()))
        matches = [Match(f"{6 * n + 5}", f"{n}") for n in range(4)]
        distiller = Distiller(teacher, student, matches, impl=impl, order=order)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        losses = []
        for step in range(20):
            batch = torch.randn(512, 2048, generator=torch.Generator().manual_seed(step)).cuda()
            total = distiller(batch).total
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.detach())
        trajectories[order] = torch.stack(losses)
        on_the_side = [stream != torch.cuda.current_stream() for stream in where[1:]]  # the first one is the dry run
        assert all(on_the_side) if order == "overlapped" else not any(on_the_side)
    torch.testing.assert_close(trajectories["overlapped"], trajectories["teacher first"], rtol=1e-6, atol=0)
