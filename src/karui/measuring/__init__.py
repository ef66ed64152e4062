"""Parameters, multiply-adds, bytes, time, memory and accuracy, measured."""
