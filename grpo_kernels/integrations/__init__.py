"""The method inside trainers that people already run; each module needs the package it is named after."""
