"""llama.cpp's own server, from the package `xllamacpp`, for comparisons with `scripts/serve/load.py`.

pip install xllamacpp; python3 scripts/serve/llama_server.py MODEL PORT PARALLEL THREADS [CONTEXT_OF_EACH]
"""

import sys
import time

import xllamacpp

model, port, parallel, threads = sys.argv[1], *map(int, sys.argv[2:5])
context = int(sys.argv[5]) if len(sys.argv) > 5 else 1024
parameters = xllamacpp.CommonParams()
parameters.model.path = model
parameters.hostnames, parameters.port = ["127.0.0.1"], port
parameters.n_parallel, parameters.n_ctx = parallel, parallel * context
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(parameters)
print(xllamacpp.BUILD_INFO, server.listening_address, flush=True)
while True:
    time.sleep(1)
