"""Drop-in tools: they take the arguments of QEMU's tools, print the same text and JSON, and end with the same codes.

The reference is QEMU 7.2, whose manuals are ``docs/tools/*.rst`` of its source package. A tool calls itself by the name it was started with.
"""
