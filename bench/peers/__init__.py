"""Systems that the bus is measured beside: plain forwarders, empty workers, installers."""
