"""The sub-commands of ``cowhand``, one a file.

Each file has ``EXAMPLES`` (text), ``WRITES`` (whether it changes something, and so must be let end at a safe point), ``configure(parser)``
and ``run(args, context)``, which returns the exit code and raises CowhandError. Where it exists, ``writes(args)`` takes the place of
``WRITES``.
"""
