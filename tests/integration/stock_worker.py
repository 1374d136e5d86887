"""A worker of a stock llama.cpp: python stock_worker.py FOLDER_OF_ITS_LIBRARIES --port N. Port 0: any that is free."""

import ctypes
import socket
import sys

folder, port = sys.argv[1], int(sys.argv[3])
with socket.create_server(("127.0.0.1", port)) as free:
    port = free.getsockname()[1]
ggml = ctypes.CDLL(f"{folder}/libggml.so", ctypes.RTLD_GLOBAL)
rpc = ctypes.CDLL(f"{folder}/libggml-rpc.so")
ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(0))
print(f"listening on 127.0.0.1:{port}", flush=True)
size = ctypes.c_size_t
rpc.ggml_backend_rpc_start_server(f"127.0.0.1:{port}".encode(), None, size(1), size(1), devices)
