#!/bin/sh
# What both recipes run inside the image, in the folder with setup.cfg and constraints.txt.
# The image gets the packages, not the project: jobs run the code of the checkout that launched them.
set -eu
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends git
rm -rf /var/lib/apt/lists/*
python -m pip install -c constraints.txt ".[judge,perceptual]"
python -m pip uninstall -y sigma-cvae-hpc
python -c "import mlflow, omegaconf, safetensors, simplejpeg, submitit, torch, torchvision"
