// Go's own resolver: for each line that it reads, the address that a name has.
package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
)

func main() {
	resolver := net.Resolver{PreferGo: true}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		addresses, err := resolver.LookupIP(context.Background(), "ip4", os.Args[1])
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println(addresses[0])
	}
}
