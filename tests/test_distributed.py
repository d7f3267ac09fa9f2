"""Who shares a run: an accelerator's processes, each with its own items, and what all of them have together."""

from types import SimpleNamespace

import torch

from trimtab.distributed import ALONE, Processes


def launched(rank, number):
    """An accelerator of so many processes; what this one gives is gathered with as much of 10 more from each other."""
    gather = lambda x: torch.cat([x + 10 * other for other in range(number)])  # noqa: E731
    return SimpleNamespace(process_index=rank, num_processes=number, device=torch.device("cpu"), gather=gather)


def test_each_process_of_a_launch_has_items_of_its_own_and_together_they_have_all():
    of = [Processes.of(launched(rank, 3)) for rank in range(3)]
    assert [list(range(7))[each.mine] for each in of] == [[0, 3, 6], [1, 4], [2, 5]]
    assert of[1].everybody(torch.tensor([1, 2])).tolist() == [1, 2, 11, 12, 21, 22]


def test_a_process_alone_has_everything_and_asks_nobody():
    x = torch.tensor([1.0])
    for alone in (ALONE, Processes.of(launched(0, 1))):
        assert "abc"[alone.mine] == "abc"
        assert alone.everybody(x) is x
