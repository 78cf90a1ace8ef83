# The trainer on NVIDIA GPUs, with all that it needs; docs/gpu.md says how to build and run it.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# torch.compile and Triton call a compiler and need Python's headers
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home speedrun
USER speedrun
WORKDIR /home/speedrun
COPY --chown=speedrun . .

# a verb installs what its extra pins in pyproject.toml; the folders are here so that volumes in their place are the user's
RUN mkdir corpora runs \
    && ./run.sh plan --help >/dev/null \
    && ./run.sh data --help gpt2 >/dev/null

ENTRYPOINT ["./run.sh"]
