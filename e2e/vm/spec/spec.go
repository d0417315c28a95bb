// SPDX-License-Identifier: Apache-2.0

// Package spec is what the host and process 1 of a virtual machine say to each
// other.
package spec

// File is where the initramfs holds a Spec, in JSON.
const File = "/spec.json"

// Port is the serial line on which the machine sends Events, one JSON value a
// line. The kernel's console is another one.
const Port = "/dev/ttyS1"

// Spec is what a machine is to do before it turns itself off.
type Spec struct {
	// Modules are the paths of kernel modules, each after those it needs.
	Modules []string
	// Program is the path of the program to run, with Args and in Dir. Env is
	// its environment, as in os/exec.
	Program string
	Args    []string
	Env     []string
	Dir     string
}

// Event is one message of the machine.
type Event struct {
	// Ready: everything is prepared, the program starts.
	Ready bool `json:",omitempty"`
	// Output is a piece of what the program wrote, standard error included.
	Output []byte `json:",omitempty"`
	// Error is what kept the machine from running the program.
	Error string `json:",omitempty"`
	// Exit is the program's exit code; the last event. It is -1 for a program
	// ended by a signal.
	Exit *int `json:",omitempty"`
}
