"""The options that quickstart and its ranks share. Standard library only: help costs no installation."""

import argparse


def number(kind: type, least: float, most: float = float("inf")):
    """An argparse type: a number of `kind` from `least` to `most`."""

    def parse(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is outside {least:g} to {most:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


def with_timeout(config: str, seconds: float) -> str:
    """`config` with timeout=`seconds`, unless it has a timeout of its own: the hook's collectives are to give up when the process group's do."""
    given = any(word.startswith("timeout=") for word in config.split())
    return config if given else f"{config} timeout={seconds:g}"


def learning_rate(options: argparse.Namespace, adam: bool) -> float:
    return options.lr if options.lr is not None else 0.001 if adam else 0.05


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """What quickstart and its ranks have in common."""
    parser.add_argument("--epochs", type=number(int, 1), default=3, metavar="N", help="default 3")
    parser.add_argument("--batch", type=number(int, 1), default=64, metavar="B", help="images per rank and step; default 64")
    parser.add_argument("--optimizer", choices=("auto", "sgd", "adam"), default="auto", help="auto: adam (AdamW) where a config's target is the momentum, else sgd")
    parser.add_argument("--lr", type=number(float, 0), metavar="X", help="learning rate of the first step, which falls to 0 linearly; default 0.05, with adam 0.001")
    parser.add_argument("--momentum", type=number(float, 0, 1), default=0.9, metavar="X", help="of sgd, default 0.9; under feedback=dgc the config's own counts")
    parser.add_argument("--beta2", type=number(float, 0, 0.999999), default=0.99, metavar="X", help="of adam's variance; default 0.99, as three epochs are short; its beta1 is the config's, else 0.9")
    parser.add_argument("--weight-decay", type=number(float, 0), default=0.0, metavar="X", help="default 0")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of the initial parameters and of the order of the images")
    parser.add_argument("--data", metavar="DIR", help="folder with the four idx files of Fashion-MNIST or MNIST, gzipped or not")
    parser.add_argument("--subset", type=number(int, 0), default=0, metavar="N", help="train on the first N images and test on the first N / 5; default: all")
    parser.add_argument("--by-label", action="store_true", help="every rank trains on neighbouring labels alone: gradients of different ranks differ as much as they can")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one rank per GPU, over NCCL; default cpu")
    parser.add_argument("--share-gpus", action="store_true", help="for tests: more ranks than GPUs, each a host of its own to NCCL")
    parser.add_argument("--timeout", type=number(float, 1), default=120, metavar="S", help="seconds after which a silent peer is an error; default 120; a timeout in the config counts for the hook")
