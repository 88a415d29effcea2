"""Runs all checks of the proxy on one fleet of real engines: proxy.py XPYD FOLDER CONNECTOR."""

import json
import sys

import clients
import matrix
from check import check_answers
from fleet import MODEL, Fleet
from disconnect import check_disconnects, settings_for


def main():
    xpyd, folder, connector = sys.argv[1:]
    options = json.dumps(matrix.OPTIONS)
    settings = (f"prefill.args={options}", f"decode.args={options}", *settings_for(connector))
    with Fleet(xpyd, folder, connector, settings) as fleet:
        fleet.wait_for_line("ready: every pair")
        print("-- answers", flush=True)
        check_answers(fleet.proxy(), fleet.decoder(), connector)
        print("-- disconnects", flush=True)
        check_disconnects(fleet, connector)
        print("-- real clients", flush=True)
        clients.compare(fleet.proxy(), fleet.decoder(), MODEL)
        print("-- every cell of docs/matrix.md", flush=True)
        matrix.check(fleet.proxy(), fleet.decoder(), MODEL, False)
        fleet.stop()
    print(f"== {connector}: passed", flush=True)


if __name__ == "__main__":
    main()
