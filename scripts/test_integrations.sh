#!/usr/bin/env bash
# Run the tests of the plugins for lmms-eval and VLMEvalKit in an environment of their own, .venv-integrations.
# Arguments go to pytest:
#   bash scripts/test_integrations.sh -k lmms -rP
# Both toolkits are installed without most of their requirements: audio, video, judge services and torchvision.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV="$PWD/.venv-integrations"
bash scripts/setup.sh
pip_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
if [ ! -e "$VENV/.integrations" ]; then
    pip_install -c constraints.txt pytest hypothesis
    pip_install accelerate datasets evaluate httpx jsonlines numexpr pybind11 pytablewriter sacrebleu scikit-learn einops \
        ftfy openai nltk wandb==0.25.0 tiktoken loguru tenacity zstandard sympy latex2sympy2 tqdm-multiprocess \
        python-dotenv zss pydantic "sentencepiece<0.2.3" "filelock<4" # the pins of the extra lmms-eval
    pip_install openpyxl pandas portalocker sty tabulate timeout-decorator validators "xlsxwriter<=3.2.3" omegaconf \
        imageio matplotlib opencv-python-headless
    pip_install --no-deps lmms-eval==0.7.3 nvidia-vlmeval==26.3 decord
    touch "$VENV/.integrations"
fi
exec "$VENV/bin/python" -m pytest -q -m integrations tests/integrations "$@"
