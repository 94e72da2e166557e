"""Every way to install, tried: see install_check.py."""
