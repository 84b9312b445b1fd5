"""The ground floor: errors, units, extents, buffers, progress, clocks and locks. Imports nothing of cowhand."""
