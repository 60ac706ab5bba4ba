"""Found by every Python process whose PYTHONPATH names this folder: connections are written down and refused.

NETWORK_ATTEMPTS names the file that they are appended to. Unix sockets and loopback pairs stay: no machine is reached.
"""

import os
import socket
import sys
from pathlib import Path


def _refuse(name, original, of_a_socket):
    def refuse(*arguments, **options):
        if of_a_socket and arguments[0].family == socket.AF_UNIX:
            return original(*arguments, **options)
        with Path(os.environ["NETWORK_ATTEMPTS"]).open("a", encoding="utf-8") as attempts:
            attempts.write(f"{name}{arguments[of_a_socket:]} in {sys.argv}\n")
        raise OSError(f"the network is forbidden here: {name}")

    return refuse


for _name in ("connect", "connect_ex", "sendto", "sendmsg"):
    setattr(socket.socket, _name, _refuse(_name, getattr(socket.socket, _name), True))
for _name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, _name, _refuse(_name, getattr(socket, _name), False))
