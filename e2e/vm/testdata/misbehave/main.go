// SPDX-License-Identifier: Apache-2.0

// Misbehave is a program that ends in the way its argument names, or not at
// all.
package main

import (
	"fmt"
	"os"
	"time"
)

func main() {
	fmt.Println("about to", os.Args[1])
	switch os.Args[1] {
	case "hang":
		hang()
	case "exit":
		os.Exit(7)
	case "panic": // of the kernel
		tell("/proc/sysrq-trigger", "c")
		hang()
	case "stall": // as the kernel reports it, again and again
		for {
			tell("/dev/kmsg", "<3>rcu: INFO: rcu_sched self-detected stall on CPU")
			time.Sleep(time.Second)
		}
	}
}

// tell writes to a file of the kernel.
func tell(file, text string) {
	if err := os.WriteFile(file, []byte(text), 0); err != nil {
		fmt.Println(err)
	}
}

// hang is no select without cases, which ends a program without other goroutines.
func hang() {
	for {
		time.Sleep(time.Hour)
	}
}
