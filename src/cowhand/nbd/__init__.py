"""The NBD protocol without I/O: what client and server say to one another. Bytes go in and come out; sockets are others' business."""
