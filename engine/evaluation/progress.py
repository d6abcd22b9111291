"""Progress bar over clips: on a terminal or in a notebook, and only where there is time to read."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

from ssast.pipelines.text import shows_progress

DELAY_S = 1.0  # what takes less shows no bar

Item = TypeVar("Item")


def with_progress(
    items: Iterable[Item],
    total: int,
    what: str,
    shown: bool,
    num_clips: Callable[[Any], int] = len,
) -> Iterator[Item]:
    """Yield batches of clips, and show on stderr how many clips are done.

    Args:
        items: The batches; the last one may be filled up.
        total: Number of clips.
        what: What is done with them, before the bar.
        shown: Whether to show the bar, if stderr is a terminal or this is a notebook.
        num_clips: Number of clips of an item.
    """
    with tqdm(
        total=total,
        desc=what,
        unit=" clips",
        delay=DELAY_S,
        miniters=1,  # else a slow batch after fast ones would not be shown
        leave=False,
        dynamic_ncols=True,
        disable=not shows_progress(shown),
    ) as bar:
        for item in items:
            yield item
            bar.update(min(num_clips(item), total - bar.n))
