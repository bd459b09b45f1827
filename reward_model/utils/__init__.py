"""What commands and configurations share."""
