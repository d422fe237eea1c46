# The project on a CUDA PyTorch image: docker build -t vlsi . && docker run --gpus all --shm-size=8g vlsi vlsi env
# Everything is installed at the versions of constraints.txt but torch and its CUDA libraries, which are the image's.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/vlsi
COPY . .
RUN grep -vE '^(torch|triton|nvidia-|cuda-)' constraints.txt > /tmp/constraints.txt \
    && python -c 'import torch; print(f"torch=={torch.__version__}")' >> /tmp/constraints.txt \
    && PIP_BUILD_CONSTRAINT=/tmp/constraints.txt pip install --no-cache-dir --constraint /tmp/constraints.txt '.[mpi,lora]' \
    && useradd --uid 1000 --create-home vlsi
USER 1000
WORKDIR /home/vlsi
CMD ["vlsi", "env"]
