"""Draws the demo's data: synthetic detection scenes in COCO layout, without a download."""

import argparse
from typing import Optional, Sequence

from mmubn.cli.errors import command, user_error
from mmubn.datasets.scenes import make_scenes


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('out_dir', nargs='?', default='data/scenes', help='folder to write')
    parser.add_argument('--num-train', type=int, default=600, help='training images')
    parser.add_argument('--num-val', type=int, default=150, help='held-out images')
    parser.add_argument('--size', type=int, default=128, help='width and height in pixels')
    parser.add_argument('--seed', type=int, default=0, help='the same seed draws the same bytes')
    return parser.parse_args(argv)


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draws, or leaves what is there."""
    args = parse_args(argv)
    with user_error(OSError, ValueError):
        written = make_scenes(**vars(args))
    if not written:
        print(f'{args.out_dir} holds these scenes already')


if __name__ == '__main__':
    main()
