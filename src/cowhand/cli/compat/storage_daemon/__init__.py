"""``cowhand-storage-daemon``: takes qemu-storage-daemon's options, and answers its monitors as it does."""

from __future__ import annotations

from collections.abc import Sequence

from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import Grammar, OptionError
from cowhand.cli.compat.program import Failure

_LONG = {
    "help": "h",
    "version": "V",
    "trace": "T",
    "blockdev": "blockdev=",
    "chardev": "chardev=",
    "export": "export=",
    "monitor": "monitor=",
    "nbd-server": "nbd-server=",
    "object": "object=",
    "pidfile": "pidfile=",
    "daemonize": "daemonize",
}
_GRAMMAR = Grammar("hVT:", _LONG, later={"compat": "compat="})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon with *arguments*, ``argv[0]`` first (those of the process by default), and return the exit status."""
    return program.main(_run, arguments, "cowhand-storage-daemon")


def _run(arguments: Sequence[str]) -> int:
    steps: list[tuple[str, str]] = []
    try:
        for key, value in _GRAMMAR.scan(arguments):
            match key:
                case "h":
                    print(_usage())
                    return 0
                case "V":
                    print(program.version_lines())
                    return 0
                case "compat":
                    program.use_profile(value)
                case "T":
                    program.warning("trace events are not recorded")
                case _:
                    steps.append((key, value))
    except OptionError as error:
        raise Failure(str(error)) from None
    from cowhand.cli.compat.storage_daemon.serving import serve

    return serve(steps)


def _usage() -> str:
    return f"""Usage: {program.name()} [options]
QEMU storage daemon, in cowhand

  -h, --help             display this help and exit
  -T, --trace            accepted; nothing is traced
  -V, --version          output version information and exit

  --blockdev [driver=]<driver>[,node-name=<N>][,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,force-share=on|off][,detect-zeroes=on|off|unmap]
             [,driver specific parameters...]
                         configure a block backend

  --chardev <options>    configure a character device backend: socket or stdio

  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]
           [,writable=on|off][,bitmap=<name>]
                         export the specified block node over NBD

  --monitor [chardev=]name[,mode=control][,pretty[=on|off]]
                         configure a QMP monitor

  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>
               [,tls-creds=<id>][,tls-authz=<id>][,max-connections=<n>]
  --nbd-server addr.type=unix,addr.path=<path>
                         start an NBD server for exporting block nodes

  --object help          list object types that can be added
  --object <type>[,<property>=<value>...]
                         create a new object of type <type>

  --pidfile <path>       write process ID to a file after startup

  --daemonize            daemonize the process, and have the parent exit
                         once startup is complete"""
