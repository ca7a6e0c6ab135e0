from llm_numba.bench import main
from llm_numba.util.cli import exit_with

if __name__ == "__main__":
    exit_with(main)
