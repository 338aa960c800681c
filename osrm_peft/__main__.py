"""The command as a module: `accelerate launch … -m osrm_peft features …` runs it in several processes."""

from osrm_peft.cli.main import main

main()
