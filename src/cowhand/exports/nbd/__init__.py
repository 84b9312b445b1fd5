"""NBD exports: the server over :mod:`cowhand.nbd` and disks. :class:`~cowhand.exports.nbd.server.NbdServer` is what users hold."""
