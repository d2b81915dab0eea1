"""Systems to compare the bus with: plain forwarders, null workers, installers."""
