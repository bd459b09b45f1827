#!/usr/bin/env bash
# An environment of its own for TRL 0.11.4, the last with the classic PPOTrainer: tests/benchmarks/classic_environment.sh FOLDER
set -euo pipefail
folder=${1:?name a folder for the environment}
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
    { echo "TRL 0.11.4 needs Python 3.10 to 3.12, $python is $("$python" -V): set PYTHON"; exit 1; }
"$python" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0  # that of our own side (constraints.txt)
"$folder/bin/pip" install --quiet trl==0.11.4 transformers==4.46.3 accelerate==1.0.1 datasets==3.1.0 rich  # trl does not declare rich
"$folder/bin/python" -W ignore -c 'import trl; trl.PPOTrainer; print(f"TRL {trl.__version__} is in '"$folder"'")'
