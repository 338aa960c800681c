"""The papers' figures beside those of reproductions that are there already: nothing is trained.

    python recipes/compare_with_papers.py docs/results/minilm docs/results/smollm2

Prints Markdown: what OSRM adds to each merge, and what merges add to single models, in the papers and in the scores of
each folder, which `recipes/reproduce.py` wrote; and what the papers' plots show, in words.
"""

import argparse
from pathlib import Path

from reproduction.experiments import EXPERIMENTS
from reproduction.papers import comparison


def main() -> None:
    """Print a section for each experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="where reproduce.py wrote README.md")
    folders = {folder.resolve().name: folder for folder in parser.parse_args().folders}
    sections = {name: comparison(name, folders) for name in EXPERIMENTS}
    print("\n\n".join("\n\n".join([f"### {name}", *texts]) for name, texts in sections.items() if texts))


if __name__ == "__main__":
    main()
