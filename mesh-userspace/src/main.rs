fn main() { mesh_userspace::datapath::probe().unwrap(); println!("ok"); }
