"""The notebooks run from start to end, and are committed with their outputs.

Cells run as they are read, but for the length of the training, which ``SHORT`` cuts:
to train as long as for the committed outputs would show nothing more. They run one
after the other in one kernel, for half of their time would be that of starting it and
importing: the next finds no name of the last, but what that imported. The kernel is of
this very interpreter, which is what jupyter_client makes of a kernel's command
``python``.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
# The line of each notebook that says how long it trains, and what it is here.
SHORT = {
    "01_quickstart.ipynb": (
        "EPOCHS, BATCH_SIZE, SEEDS = 15, 64, range(5)",
        "EPOCHS, BATCH_SIZE, SEEDS = 2, 64, range(2)",
    ),
    "02_why_momentum.ipynb": (
        "EPOCHS, BATCH_SIZE, SEEDS = 20, 64, 5",
        "EPOCHS, BATCH_SIZE, SEEDS = 6, 64, 2",
    ),
    "03_adaptive_policy.ipynb": (
        "EPOCHS, BATCH_SIZE, SEEDS = 20, 64, 5",
        "EPOCHS, BATCH_SIZE, SEEDS = 2, 64, 2",
    ),
    "04_loss_landscape.ipynb": (
        "EPOCHS, BATCH_SIZE, SEEDS = 20, 64, 5",
        "EPOCHS, BATCH_SIZE, SEEDS = 2, 64, 2",
    ),
    "05_language_model.ipynb": (
        "BATCH, STEPS, WARMUP, SEEDS = 16, 300, 30, 3",
        "BATCH, STEPS, WARMUP, SEEDS = 4, 20, 2, 2",
    ),
    "06_sweep_rho.ipynb": (
        "BATCH, STEPS, WIDTH = 64, 450, 64",
        "BATCH, STEPS, WIDTH = 64, 20, 64",
    ),
}
COLAB = "https://colab.research.google.com/github/"
# What would tell of the machine that a notebook was run on.
PATHS = re.compile(r"/(tmp|root|home|work|usr|Users)/|site-packages|ipykernel_")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def is_image(output: nbformat.NotebookNode) -> bool:
    return "image/png" in output.get("data", {})


def is_trouble(output: nbformat.NotebookNode) -> bool:
    """An exception, or what a warning writes."""
    return output.output_type == "error" or output.get("name") == "stderr"


def test_all_are_there():
    assert list(SHORT) == NOTEBOOKS


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The notebooks with the outputs of a short training."""
    folder = str(tmp_path_factory.mktemp("notebooks"))
    found = {name: read(name) for name in NOTEBOOKS}
    everything = nbformat.v4.new_notebook()
    for name, notebook in found.items():
        long, short = SHORT[name]
        assert sum(cell.source.count(long) for cell in code_cells(notebook)) == 1
        for cell in code_cells(notebook):
            cell.source = cell.source.replace(long, short)
            cell.outputs, cell.execution_count = [], None
        empty = nbformat.v4.new_code_cell("%reset -f")
        everything.cells += [empty, *code_cells(notebook)]
    # Nothing of the user's: profiles, history, and kernels of other interpreters.
    folders = ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    with pytest.MonkeyPatch.context() as patch:
        for variable in folders:
            patch.setenv(variable, folder)
        NotebookClient(
            everything,
            kernel_name="python3",
            timeout=600,
            allow_errors=True,  # for the test of each to find its own
            resources={"metadata": {"path": folder}},
        ).execute()
    return found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs(name, executed):
    found, committed = outputs(executed[name]), outputs(read(name))
    assert not [output for output in found if is_trouble(output)]
    kinds = [output.output_type for output in committed]
    assert [output.output_type for output in found] == kinds
    assert sum(map(is_image, found)) == sum(map(is_image, committed))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_with_its_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert any(map(is_image, outputs(notebook)))
    assert not [output for output in outputs(notebook) if is_trouble(output)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_name_no_machine_and_are_small(name):
    texts = []
    for output in outputs(read(name)):
        texts.append(output.get("text", ""))
        data = output.get("data", {})
        texts += [text for kind, text in data.items() if kind.startswith("text/")]
    assert not PATHS.search("\n".join(texts))
    assert (FOLDER / name).stat().st_size < 400_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_badge_opens_this_notebook(name):
    first = read(name).cells[0]
    assert first.cell_type == "markdown"
    links = re.findall(rf"\]\({COLAB}([^)]*)\)", first.source)
    assert len(links) == 1
    owner, repository, *rest = links[0].split("/")
    assert (repository, rest) == ("msam_optax", ["blob", "main", "notebooks", name])
    # The first code cell installs from the repository that the badge opens.
    install = code_cells(read(name))[0].source
    assert f"git+https://github.com/{owner}/{repository}" in install


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_first_code_cell_installs_where_the_package_is_missing(name):
    install = code_cells(read(name))[0].source
    lines = [line for line in install.splitlines() if line.strip()]
    condition, command = lines[-2:]
    assert condition == 'if importlib.util.find_spec("msam_optax") is None:'
    assert command.startswith('    %pip install -q "msam_optax[bench] @ git+https://')
