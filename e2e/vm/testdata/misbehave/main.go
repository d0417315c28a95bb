// Misbehave is a program that ends in the way its argument names, or not at
// all.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Println("about to", os.Args[1])
	switch os.Args[1] {
	case "hang":
		select {}
	case "exit":
		os.Exit(7)
	case "panic": // of the kernel
		if err := os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0); err != nil {
			fmt.Println(err)
		}
		select {}
	}
}
