"""``cowhand-nbd``: takes qemu-nbd's options, serves and lists as it does, and says the same."""

from __future__ import annotations

from collections.abc import Sequence

from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import Grammar, OptionError
from cowhand.cli.compat.program import Failure

_LONG = {
    "help": "h",
    "version": "V",
    "port": "p",
    "bind": "b",
    "socket": "k",
    "offset": "o",
    "read-only": "r",
    "allocation-depth": "A",
    "bitmap": "B",
    "connect": "c",
    "disconnect": "d",
    "list": "L",
    "snapshot": "s",
    "load-snapshot": "l",
    "nocache": "n",
    "cache": "cache=",
    "aio": "aio=",
    "discard": "discard=",
    "detect-zeroes": "detect-zeroes=",
    "shared": "e",
    "format": "f",
    "persistent": "t",
    "verbose": "v",
    "export-name": "x",
    "description": "D",
    "object": "object=",
    "tls-creds": "tls-creds=",
    "tls-hostname": "tls-hostname=",
    "tls-authz": "tls-authz=",
    "image-opts": "image-opts",
    "trace": "T",
    "fork": "fork",
    "pid-file": "pid-file=",
    "selinux-label": "selinux-label=",
    "handshake-limit": "handshake-limit=",
}
_GRAMMAR = Grammar("hVb:o:p:rsnc:dvk:e:f:tl:x:T:D:AB:L", _LONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool with *arguments*, ``argv[0]`` first (those of the process by default), and return the exit status."""
    return program.main(_run, arguments, "cowhand-nbd")


def _run(arguments: Sequence[str]) -> int:
    from cowhand.cli.compat.nbd.settings import Settings
    from cowhand.cli.compat.objects import Objects

    settings = Settings()
    objects = Objects()
    scanner = _GRAMMAR.scan(arguments)
    try:
        for key, value in scanner:
            match key:
                case "h":
                    print(usage(program.name()))
                    return 0
                case "V":
                    print(program.version_lines())
                    return 0
                case "T":
                    from cowhand.cli.compat import tracing

                    tracing.accept(value)
                case "object":
                    objects.add(value)
                case _:
                    settings.take(key, value)
    except OptionError as error:
        program.plain(error.in_libc_words(program.name()))
        raise Failure(f"Try `{program.name()} --help' for more information.") from None
    settings.finish(scanner.rest)
    if settings.tls_creds is not None:
        try:
            settings.tls = objects.tls_context(settings.tls_creds, "client" if settings.list else "server")
        except Failure as failure:
            raise Failure(f"Failed to get TLS creds: {failure.message}") from None
        if settings.tls_authz is not None:
            raise Failure("--tls-authz is not supported: let the certificates' authority decide who may connect")
    if settings.list:
        from cowhand.cli.compat.nbd.listing import show_exports

        return show_exports(settings)
    if settings.disconnect:
        from cowhand.cli.compat.nbd.device import disconnect

        return disconnect(scanner.rest[0])
    from cowhand.cli.compat.nbd.serving import serve

    return serve(settings)


def usage(name: str) -> str:
    """Return the help of the tool, which was started by *name*."""
    return f"""\
Usage: {name} [OPTIONS] FILE
  or:  {name} -L [OPTIONS]
Disk network block device server

  -h, --help                display this help and exit
  -V, --version             output version information and exit

Connection properties:
  -p, --port=PORT           port to listen on (default `10809')
  -b, --bind=IFACE          interface to bind to (default `0.0.0.0')
  -k, --socket=PATH         path to the unix socket
                            (default '/var/lock/qemu-nbd-DEVICE')
  -e, --shared=NUM          device can be shared by NUM clients (default '1')
  -t, --persistent          don't exit on the last connection
  -v, --verbose             stay in the foreground with --connect
  -x, --export-name=NAME    expose export by name (default is empty string)
  -D, --description=TEXT    export a human-readable description
      --handshake-limit=N   limit a client's handshake to N seconds
                            (default 10; 0: no limit)

Exposing part of the image:
  -o, --offset=OFFSET       offset into the image
  -A, --allocation-depth    expose the allocation depth
  -B, --bitmap=NAME         expose a persistent dirty bitmap

General purpose options:
  -L, --list                list exports available from another NBD server
  --object type,id=ID,...   define an object such as 'secret' for providing
                            passwords and/or encryption keys
  --tls-creds=ID            use id of an earlier --object to provide TLS
  --tls-authz=ID            use id of an earlier --object to provide
                            authorization
  --tls-hostname=NAME       with -L: name that the server's certificate
                            must have
  -T, --trace PATTERN       accepted; there are no trace events
  --fork                    fork off the server process and exit the parent
                            once the server is running
  --pid-file=PATH           store the server's process ID in the given file
  --selinux-label=LABEL     set SELinux process label on listening socket

Kernel NBD client support:
  -c, --connect=DEV         connect FILE to the local NBD device DEV
  -d, --disconnect          disconnect the specified device

Block device options:
  -f, --format=FORMAT       set image format (raw, qcow2, ...)
  -r, --read-only           export read-only
  -s, --snapshot            use FILE as an external snapshot, create a temporary
                            file with backing_file=FILE, redirect the write to
                            the temporary one
  -l, --load-snapshot=SNAPSHOT_PARAM
                            load an internal snapshot inside FILE and export it
                            as an read-only device, SNAPSHOT_PARAM format is
                            'snapshot.id=[ID],snapshot.name=[NAME]', or
                            '[ID_OR_NAME]'
  -n, --nocache             disable host cache
      --cache=MODE          set cache mode used to access the disk image, the
                            valid options are: 'none', 'writeback' (default),
                            'writethrough', 'directsync' and 'unsafe'
      --aio=MODE            accepted: native, io_uring or threads
      --discard=MODE        set discard mode (ignore, unmap)
      --detect-zeroes=MODE  set detect-zeroes mode (off, on, unmap)
      --image-opts          treat FILE as a full set of image options"""
